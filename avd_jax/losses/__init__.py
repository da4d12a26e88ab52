"""The losses of the paper as pure functions; reduction, masking and weighting belong to the caller."""
