"""`python -m benchmarks.gpu` checks and measures all that needs a GPU within ten minutes.

`session` runs the steps of `steps` one after the other, each by `step` in a process of
its own. A step writes records, `session` saves each record in gpu.json at once, and
`digest` makes the table that ends the output.
"""
