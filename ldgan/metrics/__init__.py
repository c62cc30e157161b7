"""Numbers that judge images: metrics eat uint8 images and know neither generative models nor file formats."""
