"""Parts of `scripts/benchmarks/speed.py`."""
