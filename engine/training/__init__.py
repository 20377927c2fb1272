"""A training step and a run: the run and its batch, ranks, optimizer, checks of the settings, leaner operations."""
