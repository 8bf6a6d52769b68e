"""Benchmarks: each file with a `main` is a command, `python -m scripts.benchmarks.NAME`."""
