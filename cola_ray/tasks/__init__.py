"""Tasks with verifiable answers behind one small protocol; :func:`make_task` picks one by name."""

from cola_ray.config import TaskConfig
from cola_ray.tasks.protocol import Problem, Task, render_prompt
from cola_ray.tasks.verifiable import Gsm8k, ReasoningGym

__all__ = ["Problem", "Task", "make_task", "render_prompt"]

# Sums and differences of two to four one-digit numbers: small enough that a base of 0.8 M parameters trained for
# seconds is right sometimes, not always.
ARITHMETIC_OPTIONS = {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1}


def make_task(config: TaskConfig, seed: int) -> Task:
    """The task named in the settings. Problems and their split depend on ``seed`` only through their order."""
    if config.name == "gsm8k":
        return Gsm8k(config.path, seed)
    if config.name == "arithmetic":
        return ReasoningGym("chain_sum", {**ARITHMETIC_OPTIONS, **config.options}, config.num_problems, seed, bare=True)
    return ReasoningGym(config.name, config.options, config.num_problems, seed)
