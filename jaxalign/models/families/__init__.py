"""Model families as data."""
