"""Small data sets and models for the recipes, the tests and first steps; nothing else in the package needs them."""
