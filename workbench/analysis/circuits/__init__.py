"""Circuits: which heads and edges carry a task, how far to trust them, how two tasks share them, and repairing one."""
