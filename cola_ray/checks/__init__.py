"""Checks before anything starts: combinations of settings, the machine, files, the hub."""
