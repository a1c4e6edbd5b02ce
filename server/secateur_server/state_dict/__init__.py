"""Tensors by their names: pairs, dtypes, globs, and the sources that they come from."""
