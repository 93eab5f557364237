"""The CoLA model: Hugging Face classes, conversion of checkpoints, and the vLLM plug-in."""
