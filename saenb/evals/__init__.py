"""What a dictionary is judged by."""
