"""The benchmark suite: `registry.py` says what is measured, the other files how. `python -m
benchmarks.bench` runs it.
"""
