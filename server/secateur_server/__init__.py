"""The pruning server: one folder for each stage of the data's way."""
