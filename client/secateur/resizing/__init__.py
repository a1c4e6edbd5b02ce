"""Smaller torch modules: `sizes` has what callers use, `modules` makes them, with torch."""
