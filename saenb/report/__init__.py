"""Figures, comparisons, run logs and pages, made from records."""
