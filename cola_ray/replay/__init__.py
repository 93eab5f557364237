"""The replay service, and the critic service that learns from it."""
