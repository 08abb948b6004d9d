"""Forward-Forward and Integrated Forward-Forward: a loss of goodness in every block."""
