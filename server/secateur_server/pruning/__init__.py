"""Tensors to scores, to choices, to masks. Pure functions on torch tensors; nothing else."""
