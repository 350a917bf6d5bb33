"""Dictionaries as other tools write them."""
