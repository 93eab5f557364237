"""Rollouts: vLLM engines that sample latent actions, and the Ray actor around one."""
