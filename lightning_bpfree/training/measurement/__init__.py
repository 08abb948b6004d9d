"""What a training costs: time and memory."""
