"""Metrics on videos and latents."""
