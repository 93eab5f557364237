"""The rollout actor of diversity: continues prefixes by chance, in one of four ways.

policy          latent actions drawn from the policy
random_actions  latent actions drawn evenly from all K; the world model makes tokens of them
base            tokens drawn from the plain base
random_tokens   tokens drawn evenly from the vocabulary
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from cola_ray.rollout.engine import Request
from cola_ray.rollout.worker import EngineWorker
from cola_ray.settings.config import Config

Chance = Literal["policy", "random_actions", "base", "random_tokens"]
CHANCES: tuple[Chance, ...] = get_args(Chance)


class ContinuationWorker(EngineWorker):
    """Over latent actions for the first two ways, over the base's tokens for the others."""

    def __init__(self, config: Config, model_path: str) -> None:
        super().__init__(config, model_path, keep_hidden_states=False)
        self.choices = self.num_actions if self.latent else len(self.tokenizer)

    async def continue_prefixes(self, prefixes: Sequence[Sequence[int]], count: int, chance: Chance) -> list[list[str]]:
        """``count`` continuations of ``rollout.max_new_tokens`` for each prefix, without it."""
        limit, rollout = self.config.rollout.max_new_tokens, self.config.rollout
        requests = []
        for place, prefix in enumerate(prefixes):
            for number in range(count):
                seed = self._seed(CHANCES.index(chance), place, number)
                forced = np.random.default_rng(seed).integers(self.choices, size=limit).tolist()
                evenly = chance.startswith("random")
                requests.append(
                    Request(prefix, seed, rollout.temperature, rollout.top_k, limit, forced if evenly else ())
                )
        made = await self.batch.complete(requests)
        texts = [self.tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in made]
        return [texts[start : start + count] for start in range(0, len(texts), count)]
