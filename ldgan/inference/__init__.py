"""From trained weights to images: models on disk, jobs, editing, pictures, cost."""
