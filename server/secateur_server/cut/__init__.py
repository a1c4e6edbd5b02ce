"""Decides which units are pruned: scores, thresholds, allocation, guard rails, masks and plans."""
