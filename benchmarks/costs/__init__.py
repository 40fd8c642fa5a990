"""What `benchmarks/mechanisms.py` measures of the rooms, and what that says of claims on their cards."""
