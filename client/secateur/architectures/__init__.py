"""Transformers from their config.json: which slices of which tensors are one unit.

`tables.py` has the architectures, one entry each. `transformer.py` finds the entry and the names of
a model's tensors, `parts.py` makes groups, `sizes.py` reads sizes off tensors into a config.
"""
