"""Videos from prompts: the samplers as compiled functions, and the run that writes video files."""
