"""From reconstructions to numbers."""
