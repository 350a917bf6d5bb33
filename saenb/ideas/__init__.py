"""The ideas: runs, experiments and their mechanisms."""
