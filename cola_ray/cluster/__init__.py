"""Ray's actors and processes: placement, calls, and detection of hangs."""
