"""Benchmarks: ratios to a named peer, measured by turns in one run."""
