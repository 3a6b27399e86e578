"""Compares fastbn's speed and memory with those of what PyTorch offers.

`pytest benchmarks --benchmark-only` prints a comparison; `python -m benchmarks.report` writes the
files that a claim may rest on.
"""
