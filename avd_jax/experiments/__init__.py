"""Evaluating what was trained, the ablation of the paper, and the pages that show both."""
