"""Benchmarks: `make bench` runs them all and writes JSON and plots to bench/results."""
