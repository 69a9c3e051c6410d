"""LeRobot's checkpoint layout: features in config.json, processor files, normaliser statistics, batch keys."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from hooked_vla.spec import FeatureSpec

IMAGES = "observation.images."
OBS_STATE = "observation.state"
OBS_IMAGES = "observation.images"
OBS_ENVIRONMENT = "observation.environment_state"
OBS_TOKENS = "observation.language.tokens"
OBS_TOKEN_MASK = "observation.language.attention_mask"
ACTION = "action"
TASK = "task"
PREPROCESSOR = "policy_preprocessor.json"
POSTPROCESSOR = "policy_postprocessor.json"
MASK_SUFFIX = "_padding_mask"

# older checkpoints keep statistics beside the weights, sometimes with a robot's name (so100-blue) before "buffer"
_BUFFER = re.compile(
    r"(?:normalize_inputs|normalize_targets|unnormalize_outputs)\.(?:([\w-]+)_)?buffer_(\w+)\.(mean|std|min|max|q\d\d)"
)


def image_key(camera: str) -> str:
    """Batch key of a camera's images; cameras outside `observation.images.` go by their whole key."""
    return camera if camera.startswith("observation.") else IMAGES + camera


def camera_name(key: str) -> str:
    """Camera of a batch key."""
    return key.removeprefix(IMAGES)


def is_empty_camera(camera: str) -> bool:
    """Whether the camera is a placeholder that `empty_cameras` adds to the features."""
    return re.fullmatch(r"empty_camera_\d+", camera) is not None


def image_mask_key(camera: str) -> str:
    """Batch key that says, per row, whether a camera's image is real."""
    return image_key(camera) + MASK_SUFFIX


def read_features(config: Mapping[str, Any], base: FeatureSpec) -> FeatureSpec:
    """The robot side of a LeRobot config.json; `base` supplies what it does not state.

    Raises ValueError for a config without cameras, state or action.
    """
    inputs, outputs = config.get("input_features") or {}, config.get("output_features") or {}
    n_empty = config.get("empty_cameras", 0)
    keys = [key for key, feature in inputs.items() if feature["type"] == "VISUAL"]
    keys += [key for i in range(n_empty) if (key := f"{IMAGES}empty_camera_{i}") not in keys]
    if not keys or OBS_STATE not in inputs or ACTION not in outputs:
        raise ValueError(
            f"config.json needs at least one VISUAL input, {OBS_STATE!r} and {ACTION!r}; "
            f"it has inputs {sorted(inputs)} and outputs {sorted(outputs)}"
        )
    resize = config.get("resize_imgs_with_padding")
    if resize and not (len(resize) == 2 and all(isinstance(side, int) and side > 0 for side in resize)):
        raise ValueError(f"config.json: resize_imgs_with_padding must be [width, height] or null, got {resize!r}")
    return replace(
        base,
        cameras=tuple(camera_name(key) for key in keys),
        d_state=inputs[OBS_STATE]["shape"][0],
        d_action=outputs[ACTION]["shape"][0],
        resize=tuple(resize) if resize else None,
        empty_cameras=n_empty,
        n_action_steps=positive(config, "n_action_steps", base.n_action_steps),
        max_text=positive(config, "tokenizer_max_length", base.max_text),
        pad_text=config.get("pad_language_to", base.pad_text),
        tokenizer=config.get("vlm_model_name", base.tokenizer),
        normalization=dict(base.normalization if (stated := config.get("normalization_mapping")) is None else stated),
    )


def write_features(features: FeatureSpec, image_size: tuple[int, int]) -> dict[str, Any]:
    """The fields of config.json that `read_features` reads; image_size is (height, width) of the camera images."""
    images = {image_key(c): {"type": "VISUAL", "shape": [3, *image_size]} for c in features.cameras}
    return {
        "input_features": images | {OBS_STATE: {"type": "STATE", "shape": [features.d_state]}},
        "output_features": {ACTION: {"type": "ACTION", "shape": [features.d_action]}},
        "resize_imgs_with_padding": list(features.resize) if features.resize else None,
        "empty_cameras": features.empty_cameras,
        "n_action_steps": features.n_action_steps,
        "tokenizer_max_length": features.max_text,
        "pad_language_to": features.pad_text,
        "vlm_model_name": features.tokenizer,
        "normalization_mapping": dict(features.normalization),
    }


def read_step_features(config: Mapping[str, Any], base: FeatureSpec) -> FeatureSpec:
    """The same for a policy without language: cameras and state may be absent, an environment state may be there.

    Raises ValueError for a config with neither cameras nor environment state, or without action.
    """
    inputs, outputs = config.get("input_features") or {}, config.get("output_features") or {}
    keys = [key for key, feature in inputs.items() if feature["type"] == "VISUAL"]
    if not (keys or OBS_ENVIRONMENT in inputs) or ACTION not in outputs:
        raise ValueError(
            f"config.json needs a VISUAL input or {OBS_ENVIRONMENT!r}, and {ACTION!r}; "
            f"it has inputs {sorted(inputs)} and outputs {sorted(outputs)}"
        )
    return replace(
        base,
        cameras=tuple(camera_name(key) for key in keys),
        d_state=inputs[OBS_STATE]["shape"][0] if OBS_STATE in inputs else 0,
        d_environment=inputs[OBS_ENVIRONMENT]["shape"][0] if OBS_ENVIRONMENT in inputs else 0,
        d_action=outputs[ACTION]["shape"][0],
        n_obs_steps=config.get("n_obs_steps", base.n_obs_steps),
        n_action_steps=config.get("n_action_steps", base.n_action_steps),
        normalization=dict(base.normalization if (stated := config.get("normalization_mapping")) is None else stated),
    )


def write_step_features(features: FeatureSpec, image_size: tuple[int, int]) -> dict[str, Any]:
    """The fields of config.json that `read_step_features` reads; image_size is (height, width) of the images."""
    inputs: dict[str, Any] = {image_key(c): {"type": "VISUAL", "shape": [3, *image_size]} for c in features.cameras}
    if features.d_state:
        inputs[OBS_STATE] = {"type": "STATE", "shape": [features.d_state]}
    if features.d_environment:
        inputs[OBS_ENVIRONMENT] = {"type": "ENV", "shape": [features.d_environment]}
    return {
        "input_features": inputs,
        "output_features": {ACTION: {"type": "ACTION", "shape": [features.d_action]}},
        "n_obs_steps": features.n_obs_steps,
        "n_action_steps": features.n_action_steps,
        "normalization_mapping": dict(features.normalization),
    }


def positive(config: Mapping[str, Any], option: str, default: Any, kind: type = int) -> Any:
    """A number of config.json that must be above 0, `default` where it is absent.

    Raises ValueError naming the option.
    """
    value = config.get(option, default)
    number = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not number or isinstance(value, bool) or value <= 0:
        raise ValueError(f"config.json: {option} must be a {kind.__name__} above 0, got {value!r}")
    return value


def statistics_of_buffers(keys: Iterable[str], feature_keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Buffer key -> (feature key, statistic), for older checkpoints; buffers write dots as underscores.

    Of several robots' statistics for a feature none is the feature's own: they go under `<robot>.buffer.<feature>`, as
    in LeRobot's processor files of such checkpoints.
    Raises ValueError for a buffer of no known feature.
    """
    by_buffer = {key.replace(".", "_"): key for key in feature_keys}
    found: dict[str, tuple[str, str, str]] = {}
    robots: dict[str, set[str]] = {}
    for key in keys:
        match = _BUFFER.fullmatch(key)
        if match is None:
            continue
        robot, buffer, statistic = match.groups(default="")
        if buffer not in by_buffer:
            raise ValueError(f"statistics {key!r} belong to no feature of config.json; features: {sorted(by_buffer)}")
        found[key] = (robot, by_buffer[buffer], statistic)
        robots.setdefault(by_buffer[buffer], set()).add(robot)
    own = {feature: "" if "" in names or len(names) > 1 else next(iter(names)) for feature, names in robots.items()}
    return {
        key: (feature if robot == own[feature] else f"{robot}.buffer.{feature}", statistic)
        for key, (robot, feature, statistic) in found.items()
    }


def processor_steps(text: str | bytes, file: str) -> list[dict[str, Any]]:
    """The steps of a processor file.

    Raises ValueError when the file is not a processor.
    """
    steps = json.loads(text).get("steps")
    if not isinstance(steps, list):
        raise ValueError(f"{file} has no list of steps")
    return steps
