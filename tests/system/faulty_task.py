"""Arithmetic whose reward function misbehaves on a share of the problems; used by name in test_faults.py."""

import time

from cola_ray.settings.config import TaskConfig
from cola_ray.tasks.verifiable import Arithmetic


class Faulty(Arithmetic):
    """Of every 100 training problems, the first raises, the second hangs, the third is NaN, if ``options`` names it."""

    @classmethod
    def of(cls, config: TaskConfig, seed: int) -> "Faulty":
        return cls(config, seed)

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self.faults = {name for name in ("raise", "hang", "nan") if config.options.get(name)}
        super().__init__({}, 500, seed)

    def score(self, split, index, response):
        fault = {0: "raise", 1: "hang", 2: "nan"}.get(index % 100) if split == "train" else None
        if fault in self.faults:
            if fault == "raise":
                raise KeyError("gold answer")
            if fault == "hang":
                time.sleep(600)
            return float("nan")
        return super().score(split, index, response)
