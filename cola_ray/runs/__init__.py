"""A run's life: its folder and record, what it prints and logs, how it ends, and what it resumes from."""
