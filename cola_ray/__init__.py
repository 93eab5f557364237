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


_OURS = "cola_ray.model.modeling_cola"


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


# By name, as transformers knows its own: a class would have to be imported while transformers is half loaded.
register_post_import_hook(_tell_config, "transformers.models.auto.configuration_auto")
register_post_import_hook(_tell_models, "transformers.models.auto.modeling_auto")
