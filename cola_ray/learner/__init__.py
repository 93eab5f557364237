"""Learners: DeepSpeed ZeRO-3, the pre-training stages, the RL step."""
