"""Measures norms that share statistics between processes, and models their cost at scale.

`python -m benchmarks.sync` measures on this machine. `python -m benchmarks.sync.model` draws what
a model says of up to 1,024 GPUs, and measures nothing.
"""
