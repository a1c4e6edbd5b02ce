"""Which units are pruned: observe, decide, mark."""
