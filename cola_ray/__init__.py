"""Reinforcement learning for language models in a learned latent action space, on Ray.

Importing the package registers CoLA with Hugging Face's auto classes:

    >>> import cola_ray
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("outputs/demo/model")  # doctest: +SKIP
"""

from transformers import AutoConfig, AutoModelForCausalLM

from cola_ray.model.modeling_cola import CoLAConfig, CoLAForCausalLM

__version__ = "0.1.0"
__all__ = ["CoLAConfig", "CoLAForCausalLM", "__version__"]

AutoConfig.register("cola", CoLAConfig, exist_ok=True)
AutoModelForCausalLM.register(CoLAConfig, CoLAForCausalLM, exist_ok=True)
