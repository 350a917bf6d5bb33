"""Where texts, models and streams come from."""
