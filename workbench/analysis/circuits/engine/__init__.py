"""Forwards in which parts of the residual stream are changed."""
