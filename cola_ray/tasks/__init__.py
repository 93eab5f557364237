"""Tasks with verifiable answers, and multi-turn environments, each behind a small protocol and selected by name."""

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from cola_ray import registry
from cola_ray.settings.config import TaskConfig, is_environment
from cola_ray.settings.limits import Count, refusal
from cola_ray.tasks.environment import Dialogue, Environment, completed, demonstrated, keeps_state
from cola_ray.tasks.guessing import ChatOracle
from cola_ray.tasks.protocol import Problem, Prompts, Task, answer_of
from cola_ray.tasks.rewarded import REWARD_MODEL, Rewarded
from cola_ray.tasks.verifiable import ReasoningGym, Thinking

__all__ = [
    "Environment", "PlayedTask", "Problem", "Prompts", "Task", "answer_of", "least_right_reward",
    "make_environment", "make_task", "stop_strings", "to_pretrain_on",
]  # fmt: skip

# Settings that an environment takes in addition to its options.
_SETTINGS = {"jericho": ("game",), "data_science": ("path",), "program": ("command", "tool_parser")}

# The instruction for an endpoint that answers instead of the tables, and the only answers that are allowed.
ORACLES: dict[str, tuple[str, tuple[str, ...]]] = {
    "twenty_questions": (
        "We play Twenty Questions and the hidden object is: {name}. Answer each question with exactly one of "
        '"Yes.", "No." and, if it cannot be answered so, "Invalid Question."',
        ("Yes.", "No.", "Invalid Question."),
    ),
    "guess_city": (
        "You live in {name} and somebody guesses where that is. Answer each question truthfully in one short sentence "
        "without naming the city.",
        (),
    ),
}


class PlayedTask:
    """Makes a multi-turn environment's demonstrations available for pre-training."""

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self.environment, self.count, self.seed = make_environment(config), config.num_problems, seed

    def dialogues(self) -> Sequence[Dialogue]:
        return demonstrated(self.environment, self.count, self.seed)

    def texts(self) -> list[str]:
        pieces = ((dialogue.opening, *itertools.chain(*dialogue.turns)) for dialogue in self.dialogues())
        return list(itertools.chain(*pieces))


def to_pretrain_on(config: TaskConfig, seed: int) -> Prompts | PlayedTask:
    """The task or environment named in the settings."""
    return PlayedTask(config, seed) if is_environment(config.name) else make_task(config, seed)


def make_task(config: TaskConfig, seed: int) -> Task:
    """The task named in the settings. Problems and their split depend on ``seed`` only through their order.

    A class, or its class method ``of`` if it has one, is called with (TaskConfig, seed). A name that is not in the
    registry is a generator of reasoning-gym. The task preference has prompts but no verifier, since its responses are
    scored elsewhere.
    """
    task = _make_task(config, seed)
    if any(reward != REWARD_MODEL for reward in config.reward):
        task = Rewarded.of(config, task)
    return Thinking(task) if config.thinking else task


def _make_task(config: TaskConfig, seed: int) -> Task:
    found = task_class(config.name)
    if found is None:
        return ReasoningGym(config.name, config.options, config.num_problems, seed)
    task: Task = called(found)(config, seed)
    return task


def called(found: Callable[..., Any]) -> Callable[..., Any]:
    """The callable that makes a task from (TaskConfig, seed): a class's ``of`` if it has one, else the class itself."""
    return getattr(found, "of", found)


def task_class(name: str) -> Callable[..., Any] | None:
    """The class or function that makes the task or environment of this name; None for a generator of reasoning-gym.

    Raises:
        NotFoundError: nothing is found at an import path.
    """
    kind: registry.Kind = "environment" if is_environment(name) else "task"
    if not registry.is_path(name) and name not in registry.names(kind):
        return None
    found: Callable[..., Any] = registry.find(kind, name)
    return found


def least_right_reward(config: TaskConfig) -> float | None:
    """The smallest reward of a right response; None if nothing says which responses are right.

    It is ``task.right_from`` or, if that is not set, the attribute ``right_from`` of the task's class, see
    :class:`Task`, or of a single reward function; if several rewards are summed, none of them counts.
    """
    if config.right_from is not None or len(config.reward) > 1:
        return config.right_from
    own = task_class(config.name) or ReasoningGym
    found = registry.find("reward", config.reward[0]) if config.reward and config.reward != ("verifier",) else own
    least = getattr(found, "right_from", None)
    return None if least is None else least * (config.reward_weights or (1.0,))[0]


def stop_strings(config: TaskConfig) -> tuple[str, ...]:
    """Strings that end a response to this task: the attribute ``stop`` of its class."""
    return tuple(getattr(task_class(config.name), "stop", ()))


def make_environment(config: TaskConfig) -> Environment:
    """One environment of the multi-turn task named in the settings; ``task.options`` are its arguments.

    A user's class is called with the options. If it has no state, one is added (:func:`completed`), and ``max_turns``
    limits its episodes unless the class takes that option itself. Raises ValueError for an option that the environment
    does not take, and whatever the environment raises for an option's value.
    """
    make: Callable[..., Any] = registry.find("environment", config.name)
    named: dict[str, object] = {setting: getattr(config, setting) for setting in _SETTINGS.get(config.name, ())}
    if config.name == "tools":
        named["config"] = config
    if config.oracle:
        named["oracle"] = ChatOracle(config.oracle, *ORACLES[config.name])
    parameters = inspect.signature(make).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    taken = [name for name in parameters if name not in {*named, "oracle"}]
    options = dict(config.options)
    limit: Any = 0
    if "max_turns" in options and "max_turns" not in taken and not keeps_state(make):
        limit = options.pop("max_turns")
        if wrong := refusal("task.options.max_turns", limit, Count):
            raise ValueError(wrong)
    for name, value in options.items():
        if name not in taken and not takes_any:
            raise ValueError(f"task.options.{name} = {value!r}: {config.name} takes {', '.join(taken) or 'none'}")
        if name in taken and (wrong := refusal(f"task.options.{name}", value, _annotation(make, name))):
            raise ValueError(wrong)
    return completed(make(**named, **options), limit)


def _annotation(make: Callable[..., Any], name: str) -> Any:
    """A parameter's annotation with its limits; any value is allowed if there is none, or it cannot be read."""
    try:
        return get_type_hints(getattr(make, "__init__", make), include_extras=True).get(name, Any)
    except (NameError, TypeError):
        return Any
