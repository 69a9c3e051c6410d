"""The policies that a worker runs: those that come with the package, and folders on this machine. Never the hub.

One at a time is kept; a run's own must have the very weights that its manifest says.
"""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from hooked_vla.atlas.worker import WorkError
from hooked_vla.rollouts.manifest import weight_hash
from hooked_vla.vla import HookedVLA
from hooked_vla.weights import shipped_policies

_LOADED: dict[str, HookedVLA] = {}
_HASHES: dict[str, str] = {}


def load_policy(name: str) -> HookedVLA:
    """A policy of the package by its name, or of a folder by its path.

    Raises WorkError for anything else, and where the files cannot be loaded.
    """
    if name not in _LOADED:
        if name not in shipped_policies() and not Path(name).is_dir():
            raise WorkError(
                f"the model {name!r} is not on this machine: it is no folder here, and does not come with the package "
                f"({', '.join(shipped_policies())})"
            )
        try:
            model = HookedVLA.from_pretrained(name)
        except (ValueError, OSError) as error:
            raise WorkError(f"the model {name!r} cannot be loaded: {error}") from error
        # two large models would not fit
        _LOADED.clear()
        _LOADED[name] = model
    model = _LOADED[name]
    model.reset_hooks(including_permanent=True)
    return model


def load_checked(about: Mapping[str, Any]) -> HookedVLA:
    """The policy of a run. about: the manifest's "model".

    Raises WorkError as `load_policy`, for a scripted expert, and for other weights than the run's.
    """
    name, weights = about.get("name"), about.get("weights")
    if not isinstance(name, str) or not isinstance(weights, str):
        raise WorkError(f"{name!r} acted in this run, which is no network")
    model = load_policy(name)
    if name not in _HASHES or _LOADED[name] is not model:
        _HASHES.clear()
        _HASHES[name] = weight_hash(model)
    if _HASHES[name] != weights:
        raise WorkError(
            f"the model {name!r} on this machine has other weights ({_HASHES[name][:12]}…) than those that acted in "
            f"this run ({weights[:12]}…)"
        )
    return model


def data_url(image: UInt8[np.ndarray, "height width 3"], kind: str = "png") -> str:
    """A picture as a page shows it: "png", exactly, or "jpeg", a tenth of the size."""
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(sink, kind.upper(), **({"quality": 88} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(sink.getvalue()).decode()}"
