"""What the method costs and what it gains, measured against the reference algorithm. `scripts/bench.py` runs it."""
