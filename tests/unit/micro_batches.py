"""Micro-batches of which a test names what matters; a module, for the processes that tests spawn import it, too."""

import torch

from cola_ray.learner.micro_batch import MicroBatch


def micro_batch(**given: torch.Tensor) -> MicroBatch:
    """Fields by name; of those left out, masks are the actions', and all else is 0 or as if nothing were padded.

    A row's actions are one turn.
    """
    like = given.get("action_mask", given.get("scored_mask"))
    empty, whole = torch.zeros(like.shape), torch.zeros(like.shape, dtype=torch.long)
    fields = {"input_ids": whole, "attention_mask": whole + 1, "actions": whole, "action_mask": like,
              "scored_mask": like, "rollout_log_probs": empty, "advantages": empty, "rewards": empty,
              "discounts": empty, "turn_starts": like & (like.cumsum(1) == 1)}  # fmt: skip
    return MicroBatch(**(fields | given))
