"""Microbenchmarks: `python -m benchmarks --help`."""
