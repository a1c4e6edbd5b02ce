"""Follows units through a traced model. Imported with torch only."""
