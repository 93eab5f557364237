"""Reinforcement learning for language models in a learned latent action space, on Ray.

Importing the package makes CoLA known to Hugging Face's auto classes:

    >>> import cola_ray
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("outputs/demo/model")  # doctest: +SKIP

It loads neither torch nor transformers by itself: classes come when they are asked for, and the auto classes are told
when transformers loads them.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt.importer import register_post_import_hook

if TYPE_CHECKING:
    from cola_ray.model.modeling_cola import CoLAConfig, CoLAForCausalLM

__version__ = "0.1.0"
__all__ = ["CoLAConfig", "CoLAForCausalLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_OURS), name)


_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_AUTO_MODEL = "transformers.models.auto.modeling_auto"
_OURS = "cola_ray.model.modeling_cola"
_loaded = set[str]()


def _register(module: ModuleType) -> None:
    """Make CoLA known to the auto classes that are loaded; while one of the modules is half loaded, its turn comes."""
    _loaded.add(module.__name__)
    if any(name in sys.modules and name not in _loaded for name in (_AUTO_CONFIG, _AUTO_MODEL, _OURS)):
        return
    ours = importlib.import_module(_OURS)
    if _AUTO_CONFIG in _loaded:
        sys.modules[_AUTO_CONFIG].AutoConfig.register("cola", ours.CoLAConfig, exist_ok=True)
    if _AUTO_MODEL in _loaded:
        auto = sys.modules[_AUTO_MODEL]
        auto.AutoModelForCausalLM.register(ours.CoLAConfig, ours.CoLAForCausalLM, exist_ok=True)


for _name in (_AUTO_CONFIG, _AUTO_MODEL, _OURS):
    register_post_import_hook(_register, _name)
