"""Data: prompts, video files, encoded latents sets and the input pipeline."""
