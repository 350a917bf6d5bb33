"""What is done with the chosen features."""
