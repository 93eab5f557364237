"""Tasks with verifiable answers behind one small protocol; :func:`make_task` picks one by name."""

import importlib

from cola_ray.config import TaskConfig
from cola_ray.tasks.protocol import Problem, Task, render_prompt
from cola_ray.tasks.verifiable import Arithmetic, Gsm8k, ReasoningGym

__all__ = ["Problem", "Task", "make_task", "render_prompt"]


def make_task(config: TaskConfig, seed: int) -> Task:
    """The task named in the settings. Problems and their split depend on ``seed`` only through their order.

    A name like ``package.module:Class`` is called with (TaskConfig, seed).
    """
    if config.name == "gsm8k":
        return Gsm8k(config.path, seed)
    if config.name == "arithmetic":
        return Arithmetic(config.options, config.num_problems, seed)
    if ":" in config.name:
        module, _, attribute = config.name.partition(":")
        task: Task = getattr(importlib.import_module(module), attribute)(config, seed)
        return task
    return ReasoningGym(config.name, config.options, config.num_problems, seed)
