"""Networks of stage 1. They take numbers, never a config, and know tensors alone."""
