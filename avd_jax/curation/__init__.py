"""Curation: from raw videos to a training set. Stages are pure functions; scores come first, thresholds later."""
