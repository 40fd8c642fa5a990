"""Proofs by value of what a tap has read: its axes, its rows, its keys, and what nobody reads."""
