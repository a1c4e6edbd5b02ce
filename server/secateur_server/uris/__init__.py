"""Opens and writes what callers name by URI, where the operator has listed it."""
