"""Replay of turns and the critic that learns from them, each a service of its own."""
