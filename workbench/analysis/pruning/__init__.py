"""Heads taken out of a model, and the curve of what that costs."""
