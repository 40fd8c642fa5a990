"""Forwards in which some of what is written to the residual stream is changed."""
