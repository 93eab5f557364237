"""Environments that are registered with gymnasium, by their ids: ``task.name gymnasium:ID``.

gymnasium:MyGame-v0              of an installed package that registers itself
gymnasium:my_package:MyGame-v0   of a module, which is imported first

What else the environment's class has (``stop``, ``max_turns``, demonstrations, a state) counts as if it were named
itself, although gymnasium's wrappers hide it.
"""

import importlib
from typing import Any

from cola_ray.registry import NotFoundError, error_in_a_line
from cola_ray.tasks.environment import STATE

OFFERED = ("max_turns", "demonstrations", *STATE)
"""What an environment may have besides gymnasium's methods."""


def registered(name: str) -> Any:
    """Return a class whose objects are what ``gymnasium.make`` gives for this id; its arguments are those of ``make``.

    Raises:
        NotFoundError: gymnasium is not installed, or has no such id.
    """
    try:
        import gymnasium
        from gymnasium.envs.registration import load_env_creator
    except ModuleNotFoundError:
        raise NotFoundError("needs the package gymnasium; `pip install gymnasium` installs it") from None
    module, _, identity = name.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        gymnasium.spec(identity)
    except (Exception, SystemExit) as error:  # including those of the imported module
        raise NotFoundError(f"{error_in_a_line(error)}; give an id that gymnasium knows, or module:ID") from None

    class Registered(gymnasium.Wrapper):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self, **options: Any) -> None:
            super().__init__(gymnasium.make(identity, **options))
            # The wrapper that limits an episode's steps counts them itself, where a restored state does not reach.
            hidden = OFFERED if self.spec is None or self.spec.max_episode_steps is None else ("demonstrations",)
            for name in hidden:
                if hasattr(self.unwrapped, name):
                    setattr(self, name, getattr(self.unwrapped, name))

    entry = gymnasium.spec(identity).entry_point
    found = load_env_creator(entry) if isinstance(entry, str) else entry
    Registered.stop = getattr(found, "stop", ())  # type: ignore[attr-defined]
    return Registered
