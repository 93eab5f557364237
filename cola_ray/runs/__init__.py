"""A run's life: its folder and record, what is shown and logged, how it ends, what it goes on from."""
