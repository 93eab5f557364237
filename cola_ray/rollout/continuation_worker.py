"""The rollout actor of diversity studies: continues prefixes, drawing in one of four ways.

policy           latent actions drawn from the policy
random_actions   latent actions drawn uniformly from all K; the world model turns them into tokens
base             tokens drawn from the plain base
random_tokens    tokens drawn uniformly from the vocabulary
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from cola_ray.rollout.worker import EngineWorker
from cola_ray.settings.config import Config

Sampling = Literal["policy", "random_actions", "base", "random_tokens"]
SAMPLINGS: tuple[Sampling, ...] = get_args(Sampling)


class ContinuationWorker(EngineWorker):
    """Serves a CoLA checkpoint for the first two ways, and a plain base for the others."""

    def __init__(self, config: Config, model_path: str) -> None:
        super().__init__(config, model_path, keep_hidden_states=False)
        self.choices = self.num_actions if self.latent else len(self.tokenizer)

    async def continue_prefixes(
        self, prefixes: Sequence[Sequence[int]], count: int, sampling: Sampling
    ) -> list[list[str]]:
        """Return ``count`` continuations of each prefix, without it, of at most ``rollout.max_new_tokens`` tokens."""
        limit = self.config.rollout.max_new_tokens
        requests = []
        for place, prefix in enumerate(prefixes):
            for number in range(count):
                seed = self._seed(SAMPLINGS.index(sampling), place, number)
                forced = np.random.default_rng(seed).integers(self.choices, size=limit).tolist()
                uniform = sampling.startswith("random")
                requests.append(self._sampled(prefix, seed, limit, actions=forced if uniform else ()))
        made = await self.batch.complete(requests)
        texts = [self.tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in made]
        return [texts[start : start + count] for start in range(0, len(texts), count)]
