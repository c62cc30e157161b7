"""From trained weights to latents and images: models on disk, encoding, decoding."""
