"""Proofs by value of what a tap has seen: which axis is which, and which rows a site accounts for."""
