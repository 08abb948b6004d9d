"""Small data sets and models for the recipes, the tests and tutorials; nothing else in the package needs them."""
