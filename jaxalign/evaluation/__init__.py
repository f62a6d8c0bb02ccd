"""How methods are decoded, measured, compared and drawn."""
