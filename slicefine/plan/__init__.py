"""Peak memory, measured and planned."""
