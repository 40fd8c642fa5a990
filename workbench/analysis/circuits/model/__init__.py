"""The graph of a model: its layers, senders and receivers."""
