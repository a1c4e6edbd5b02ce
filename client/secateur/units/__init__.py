"""One number for each unit, from statistics; and the order of units that suits N:M masks."""
