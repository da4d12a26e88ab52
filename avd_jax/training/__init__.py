"""Training: configuration, state, steps, checkpoints and the host loop."""
