"""Interpretability for vision-language-action models: public VLAs as one hooked model.

>>> from hooked_vla import HookedVLA
>>> model = HookedVLA.from_pretrained("lerobot/smolvla_base")
>>> actions, cache = model.run_with_cache(observation)
"""

from hooked_vla.hooks import Activation, ActivationCache, HookPoint
from hooked_vla.inputs import Actions, ModelInputs, Observation, Segments
from hooked_vla.registry import get_spec, list_models
from hooked_vla.vla import HookedVLA

__all__ = [
    "Actions",
    "Activation",
    "ActivationCache",
    "HookPoint",
    "HookedVLA",
    "ModelInputs",
    "Observation",
    "Segments",
    "get_spec",
    "list_models",
]  # fmt: skip
