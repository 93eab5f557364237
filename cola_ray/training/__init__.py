"""Training runs: Ray Train over the actors, from the checks to the summary."""
