"""Direct feedback alignment: fixed random matrices bring the error at the output to every block."""
