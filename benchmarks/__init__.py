"""How fast fastbn is, and what it uses, against what PyTorch offers.

`pytest benchmarks --benchmark-only` compares on the screen; `python -m
benchmarks.report` writes the files that a claim may rest on.
"""
