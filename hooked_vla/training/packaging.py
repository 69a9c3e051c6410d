"""A checkpoint folder in LeRobot's public layout around new weights: tokenizer, processors, statistics."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from hooked_vla import lerobot
from hooked_vla.training.language import word_tokenizer
from hooked_vla.vla import HookedVLA

# a processor step keeps its tensors in a file of its own
_STATISTICS = "policy_preprocessor_step_0_normalizer_processor.safetensors"


def statistics(values: np.ndarray) -> dict[str, Tensor]:
    """LeRobot's statistics of the last axis: mean, std, min, max, q01, q99."""
    rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
    found = {
        "mean": rows.mean(0),
        # a channel that hardly moves is not to be blown up
        "std": np.maximum(rows.std(0), 1e-2),
        "min": rows.min(0),
        "max": rows.max(0),
        "q01": np.quantile(rows, 0.01, axis=0),
        "q99": np.quantile(rows, 0.99, axis=0),
    }
    return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in found.items()}


def new_checkpoint(
    spec_name: str, folder: Path, words: Sequence[str], values: Mapping[str, np.ndarray], seed: int
) -> HookedVLA:
    """Random weights of the spec's "tabletop" size, loaded from `folder`, with all that makes them a policy.

    values: feature key ("observation.state", "action") -> recorded values, whose statistics normalise.
    """
    model = HookedVLA.from_spec(spec_name, "tabletop", seed)
    model.save_pretrained(folder)
    if words:
        word_tokenizer(list(words)).save_pretrained(folder)
    tensors = {f"{key}.{name}": value for key, each in values.items() for name, value in statistics(each).items()}
    (folder / _STATISTICS).write_bytes(save(tensors))
    modes = dict(model.spec.features.normalization)
    for file, kind in (
        (lerobot.PREPROCESSOR, "normalizer_processor"),
        (lerobot.POSTPROCESSOR, "unnormalizer_processor"),
    ):
        step: dict[str, Any] = {
            "registry_name": kind,
            "config": {"eps": 1e-8, "features": {}, "norm_map": modes},
            "state_file": _STATISTICS,
        }
        (folder / file).write_text(json.dumps({"name": file.removesuffix(".json"), "steps": [step]}, indent=1))
    return HookedVLA.from_pretrained(folder)
