"""Results in files, and where they come from."""
