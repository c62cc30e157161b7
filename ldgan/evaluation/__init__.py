"""From images to numbers that say their conditions."""
