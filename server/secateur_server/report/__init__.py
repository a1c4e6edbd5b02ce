"""Measures the tensors that are sent back, and finds what to warn of."""
