"""Environments that are registered with gymnasium, by their ids: ``task.name gymnasium:ID``.

gymnasium:MyGame-v0              of an installed package that registers itself
gymnasium:my_package:MyGame-v0   of a module, which is imported first
"""

import importlib
from typing import Any

from cola_ray.registry import NotFoundError, error_in_a_line


def registered(name: str) -> Any:
    """Return a class whose objects are what ``gymnasium.make`` gives for this id; its arguments are those of ``make``.

    Raises:
        NotFoundError: gymnasium is not installed, or has no such id.
    """
    try:
        import gymnasium
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

    return Registered
