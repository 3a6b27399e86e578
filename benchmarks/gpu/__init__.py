"""All that a GPU is to tell, in one command that fits ten minutes: `python -m benchmarks.gpu`.

`session` runs the steps of `steps` one after the other, each by `step` in a process of
its own. A step writes records, `session` saves them in gpu.json as they come, and
`digest` makes the table that ends the output.
"""
