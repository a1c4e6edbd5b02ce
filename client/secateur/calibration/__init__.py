"""Statistics of the inputs of layers. Only files that `calibrate` imports late need torch."""
