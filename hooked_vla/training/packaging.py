"""A checkpoint folder in a family's public layout around new weights: tokenizer, processors, statistics.

Most families have LeRobot's layout. GR00T's has processors of its own, and a tokenizer with a chat's marks; OpenVLA's
has statistics by data set, and says its actions with the last ids of the vocabulary.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from hooked_vla import lerobot
from hooked_vla.folders import write_file
from hooked_vla.processors.groot import NO_INSTRUCTION, conversation
from hooked_vla.spec import FeatureVLASpec, LanguageVLASpec
from hooked_vla.training.language import lay_out, split, word_tokenizer
from hooked_vla.vla import HookedVLA

# OpenVLA's name for the data that statistics are of, and GR00T's for a robot that it was not pretrained on
DATASET = "tabletop"
EMBODIMENT = "new_embodiment"
_IMAGE_TOKEN = "<IMG_CONTEXT>"
_MARK = re.compile(r"<[^<>]+>")

Values = Mapping[str, np.ndarray]


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


def new_checkpoint(spec_name: str, folder: Path, words: Sequence[str], values: Values, seed: int) -> HookedVLA:
    """Random weights of the spec's "tabletop" size, loaded from `folder`, with all that makes them a policy.

    words: of the tokenizer, beside those that the family's own prompt needs; none for a model without language.
    values: feature key ("observation.state", "action") -> recorded values, whose statistics normalise.
    Raises ValueError where the words do not fit the spec's vocabulary, or its special ids are other words.
    """
    model = HookedVLA.from_spec(spec_name, "tabletop", seed)
    model.save_pretrained(folder)
    spec = model.spec
    if isinstance(spec, FeatureVLASpec):
        _package_groot(spec, folder, words, values)
    elif isinstance(spec, LanguageVLASpec):
        _package_openvla(spec, folder, words, values)
    else:
        _package_lerobot(dict(spec.features.normalization), folder, words, values)
    return HookedVLA.from_pretrained(folder)


def _package_lerobot(modes: Mapping[str, str], folder: Path, words: Sequence[str], values: Values) -> None:
    if words:
        _write_tokenizer(folder, words)
    # a processor step keeps its tensors in a file of its own
    stored = "policy_preprocessor_step_0_normalizer_processor.safetensors"
    write_file(folder / stored, save(_flat(values)))
    for file, kind in (
        (lerobot.PREPROCESSOR, "normalizer_processor"),
        (lerobot.POSTPROCESSOR, "unnormalizer_processor"),
    ):
        step = {
            "registry_name": kind,
            "config": {"eps": 1e-8, "features": {}, "norm_map": dict(modes)},
            "state_file": stored,
        }
        _write_steps(folder / file, [step])


def _package_groot(spec: FeatureVLASpec, folder: Path, words: Sequence[str], values: Values) -> None:
    """NVIDIA's config.json, and the processors that LeRobot saves beside it (0.5.1: policies/groot)."""
    assert spec.vlm.d_vocab is not None
    pieces = conversation(spec.chat, spec.chat.formal, "", len(spec.features.cameras))
    said = "".join(piece or "" for piece in pieces)
    marks = [*dict.fromkeys(_MARK.findall(said)), _IMAGE_TOKEN]
    # the quotes that Python may put around an instruction
    spoken = split(_MARK.sub(" ", said) + NO_INSTRUCTION + "'\"")
    listed = lay_out([*words, *spoken], marks, spec.vlm.d_vocab)
    _check_ids(spec.name, listed, {_IMAGE_TOKEN: spec.image_token})
    _write_tokenizer(folder, listed, marks)
    flow = spec.flow
    pack = {
        "state_horizon": flow.n_state_steps, "action_horizon": flow.chunk, "max_state_dim": flow.d_state,
        "max_action_dim": flow.d_action, "language_key": lerobot.TASK, "formalize_language": spec.chat.formal,
        "embodiment_tag": EMBODIMENT, "embodiment_mapping": {EMBODIMENT: flow.embodiment}, "normalize_min_max": True,
    }  # fmt: skip
    unpack = {"env_action_dim": spec.features.d_action, "normalize_min_max": True}
    device = {"device": "cpu", "float_dtype": None}
    eagle = {"tokenizer_assets_repo": spec.features.tokenizer}
    steps = {
        lerobot.PREPROCESSOR: [
            ("rename_observations_processor", {"rename_map": {}}), ("to_batch_processor", {}),
            ("groot_pack_inputs_v3", pack), ("groot_eagle_encode_v3", eagle), ("groot_eagle_collate_v3", eagle),
            ("device_processor", device),
        ],
        lerobot.POSTPROCESSOR: [("groot_action_unpack_unnormalize_v1", unpack), ("device_processor", device)],
    }  # fmt: skip
    for file, each in steps.items():
        described: list[dict[str, Any]] = [{"registry_name": name, "config": config} for name, config in each]
        for i, step in enumerate(described):
            if "normalize_min_max" in step["config"]:
                step["state_file"] = f"{file.removesuffix('.json')}_step_{i}_{step['registry_name']}.safetensors"
                write_file(folder / step["state_file"], save(_flat(values)))
        _write_steps(folder / file, described)


def _package_openvla(spec: LanguageVLASpec, folder: Path, words: Sequence[str], values: Values) -> None:
    """Statistics in config.json, as of the base model, and in dataset_statistics.json, as fine-tuning leaves them."""
    readout, prompt = spec.readout, spec.prompt
    n_ids = (spec.vlm.d_vocab or 0) - readout.n_padding_ids
    # the first bin is the last id; 1 itself is a bin of its own
    bins = [f"<action {i}>" for i in reversed(range(readout.n_bins))]
    marks = {"<s>": prompt.start, "</s>": prompt.stop, "▁": prompt.end}
    listed = lay_out([*words, *split(prompt.template.format(""))], [*marks, *bins], n_ids)
    _check_ids(spec.name, listed, marks)
    _write_tokenizer(folder, listed)
    names = {lerobot.ACTION: "action", lerobot.OBS_STATE: "proprio"}
    found: dict[str, Any] = {
        names[key]: {name: value.tolist() for name, value in statistics(each).items()} for key, each in values.items()
    }
    # the gripper, which is last, is not scaled
    found["action"]["mask"] = [True] * (readout.d_action - 1) + [False]
    found["num_transitions"] = len(values[lerobot.ACTION])
    config = json.loads((folder / "config.json").read_text())
    _write_json(folder / "config.json", config | {"norm_stats": {DATASET: found}})
    _write_json(folder / "dataset_statistics.json", {DATASET: found})
    towers = spec.towers.values()
    images = {
        "image_processor_type": "PrismaticImageProcessor",
        "use_fused_vision_backbone": len(towers) > 1,
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, tower.image_size, tower.image_size] for tower in towers],
        "interpolations": ["bicubic"] * len(towers),
        "means": [list(tower.mean) for tower in towers],
        "stds": [list(tower.std) for tower in towers],
    }
    _write_json(folder / "preprocessor_config.json", images)


def _write_tokenizer(folder: Path, words: Sequence[str], whole: Sequence[str] = ()) -> None:
    """tokenizer.json and tokenizer_config.json, whose class both transformers 4 and 5 know by that name."""
    tokenizer = word_tokenizer(words, whole)
    write_file(folder / "tokenizer.json", tokenizer.backend_tokenizer.to_str(pretty=True).encode())
    config = {
        "model_max_length": tokenizer.model_max_length,
        "pad_token": tokenizer.pad_token,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokenizer.unk_token,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _check_ids(name: str, words: Sequence[str], wanted: Mapping[str, int]) -> None:
    wrong = {word: (at, words.index(word)) for word, at in wanted.items() if words.index(word) != at}
    if wrong:
        raise ValueError(
            f"{name}: the spec says other ids than the vocabulary has, word -> (spec, vocabulary): {wrong}"
        )


def _flat(values: Values) -> dict[str, Tensor]:
    return {f"{key}.{name}": value for key, each in values.items() for name, value in statistics(each).items()}


def _write_steps(path: Path, steps: Sequence[Mapping[str, Any]]) -> None:
    _write_json(path, {"name": path.name.removesuffix(".json"), "steps": list(steps)})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=1).encode())
