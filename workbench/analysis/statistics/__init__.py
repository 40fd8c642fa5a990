"""Intervals, correlations and overlaps, one home for all analyses."""
