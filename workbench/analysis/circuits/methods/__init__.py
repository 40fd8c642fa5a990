"""The ways to find a circuit, one file each."""
