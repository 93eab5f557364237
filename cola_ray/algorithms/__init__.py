"""Pure functions on tensors: no Ray, no vLLM, no input or output."""
