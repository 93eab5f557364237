"""Where generated programs and responses are executed: confined, bounded, and ended with the process that asked."""
