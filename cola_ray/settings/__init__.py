"""Settings: the tree, its limits and presets, who reads which, and what does not go together."""
