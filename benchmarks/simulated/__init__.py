"""What benchmarks/simulations.py simulates: overlap, intervals, and a list of who prints them."""
