"""Where the parts of an analysis run: one after another in this process, or side by side in workers of Ray."""
