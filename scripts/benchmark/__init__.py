"""Benchmarks of the method's cost and gain against the reference algorithm. `scripts/bench.py` runs them."""
