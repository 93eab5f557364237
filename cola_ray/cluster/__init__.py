"""Ray's actors and processes: placed, asked, watched."""
