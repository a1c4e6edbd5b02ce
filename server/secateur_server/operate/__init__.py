"""What an operator sees and sets: metrics, statuses, health."""
