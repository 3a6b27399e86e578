"""Triton kernels of batch norm and the planner that decides their launches.

No module in here imports torch. The planner (`device`, `tiling`, `passes`, `instructions`,
`prediction`, `schedules` and `plan`) is plain Python, so any machine can test it; the other
modules need Triton.
"""
