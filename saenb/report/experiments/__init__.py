"""Figures and analyses of one experiment each."""
