"""Reinforcement learning for language models in a learned latent action space, on Ray.

    import cola_ray

    config = cola_ray.preset("tiny")                               settings, as on the command line
    config = cola_ray.override(config, {"rl.kl_coef": 0.01})
    cola_ray.run("rl", config)                                     what `cola_ray rl` does
    model = cola_ray.load("outputs/rl_math-tiny-seed0/model")      a CoLA model, to generate with
    model = cola_ray.attach("my-llama", num_actions=64)            a fresh one around a base

    @cola_ray.register("advantage", "median")                      algorithms, tasks, rewards of your own

Importing the package loads neither torch nor transformers: names are imported when they are used. CoLA is registered
with Hugging Face's auto classes when transformers loads these:

    >>> import cola_ray
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("outputs/demo/model")  # doctest: +SKIP
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt.importer import register_post_import_hook

if TYPE_CHECKING:
    from cola_ray.cli import run
    from cola_ray.model.conversion import attach, load
    from cola_ray.model.modeling_cola import CoLAConfig, CoLAForCausalLM
    from cola_ray.registry import register
    from cola_ray.settings.algorithms import Algorithm
    from cola_ray.settings.config import Config, ConfigError, RunFailedError, override
    from cola_ray.settings.presets import preset

__version__ = "0.1.0"
__all__ = [
    "Algorithm", "CoLAConfig", "CoLAForCausalLM", "Config", "ConfigError", "RunFailedError", "__version__", "attach",
    "load", "override", "preset", "register", "run",
]  # fmt: skip

_MODELS = "cola_ray.model.modeling_cola"
_FROM = {
    "Algorithm": "cola_ray.settings.algorithms",
    "CoLAConfig": _MODELS,
    "CoLAForCausalLM": _MODELS,
    "Config": "cola_ray.settings.config",
    "ConfigError": "cola_ray.settings.config",
    "RunFailedError": "cola_ray.settings.config",
    "attach": "cola_ray.model.conversion",
    "load": "cola_ray.model.conversion",
    "override": "cola_ray.settings.config",
    "preset": "cola_ray.settings.presets",
    "register": "cola_ray.registry",
    "run": "cola_ray.cli",
}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FROM[name]), name)


def __dir__() -> list[str]:
    return __all__


def _tell_config(module: ModuleType) -> None:
    module.CONFIG_MAPPING_NAMES["cola"] = "CoLAConfig"
    module.CONFIG_MAPPING._modules["cola"] = sys.modules[__name__]


def _tell_models(module: ModuleType) -> None:
    for auto, names in (
        (module.AutoModel, module.MODEL_MAPPING_NAMES),
        (module.AutoModelForCausalLM, module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        names["cola"] = "CoLAForCausalLM"
        auto._model_mapping._reverse_config_mapping["CoLAConfig"] = "cola"
        auto._model_mapping._modules["cola"] = sys.modules[__name__]


# Registered by name, as transformers does for its own: a class would have to be imported while transformers is half
# loaded.
register_post_import_hook(_tell_config, "transformers.models.auto.configuration_auto")
register_post_import_hook(_tell_models, "transformers.models.auto.modeling_auto")
