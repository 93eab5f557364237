"""What programs and responses run under: confined, bounded, and gone with their owner."""
