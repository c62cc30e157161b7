"""Networks of stage 2. They take numbers, never a config, and know tensors alone."""
