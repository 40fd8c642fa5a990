"""How long a test waits for what has to come."""

PATIENCE = 600
"""Seconds: a loaded machine is slow, and only what fails waits to the end."""
