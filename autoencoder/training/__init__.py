"""Losses, and trainers of the autoencoder and of light decoders."""
