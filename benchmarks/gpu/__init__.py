"""`make gpu`: every kernel against the oracle on a GPU, then timings. `python -m benchmarks.gpu
--help`.
"""
