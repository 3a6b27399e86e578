"""Triton kernels of batch norm and the planner that decides their launches.

Nothing in here imports torch: `device`, `tiling` and `plan` are plain Python and
can be tested on any machine; the other modules need Triton.
"""
