"""Losses, data, and a trainer for each method with one short step a player."""
