"""Triton kernels of batch norm and the planner that decides their launches.

No module in here imports torch. `device`, `tiling` and `plan` are plain Python, so any
machine can test them; the other modules need Triton.
"""
