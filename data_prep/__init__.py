"""Images to webdataset shards, and shards to batches. Knows no model."""
