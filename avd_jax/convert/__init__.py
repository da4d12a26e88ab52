"""Conversion between PyTorch's checkpoints and ours, in both directions."""
