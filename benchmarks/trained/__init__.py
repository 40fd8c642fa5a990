"""What benchmarks/rooms.py trains, measures and says of it."""
