"""The mathematics of steps: the process, samplers, guidance."""
