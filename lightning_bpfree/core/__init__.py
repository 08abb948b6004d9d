"""Parts that two methods or more are made of. Needs torch only."""
