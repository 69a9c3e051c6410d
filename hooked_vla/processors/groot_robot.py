"""What a GR00T checkpoint's small files say of a robot: its embodiment, ranges of state and action, cameras, images.

LeRobot's checkpoints have processor files; NVIDIA's N1.7 has processor_config.json, statistics.json and
embodiment_id.json. NVIDIA's N1.5 leaves the order of joints to code, so its statistics cannot be used from files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load
from torch import Tensor

from hooked_vla import lerobot
from hooked_vla.policy import Normalizer
from hooked_vla.spec import FeatureVLASpec, PatchVisionSpec

_PACK = ("groot_pack_inputs_v3", "groot_n1_7_pack_inputs_v1")
_UNPACK = ("groot_action_unpack_unnormalize_v1", "groot_action_unpack_unnormalize_v2")
_ENCODE = "groot_n1_7_vlm_encode_v1"
_DECODE = "groot_n1_7_action_decode_v1"


@dataclass(frozen=True)
class RangeNormalizer(Normalizer):
    """min..max to -1..1; 0 where both are equal. clip_state, clip_action: normalised values are kept in -1..1."""

    clip_state: bool = False
    clip_action: bool = False

    def __call__(self, key: str, value: Tensor) -> Tensor:
        if key not in self.statistics:
            return value
        low, span = self._low_and_span(key, value)
        normalized = torch.where(span == 0, 0.0, 2 * (value - low) / torch.where(span == 0, 1.0, span) - 1)
        return normalized.clamp(-1, 1) if self.clip_state else normalized

    def inverse(self, key: str, value: Tensor) -> Tensor:
        """Undo the normalisation."""
        if key not in self.statistics:
            return value
        low, span = self._low_and_span(key, value)
        return ((value.clamp(-1, 1) if self.clip_action else value) + 1) / 2 * span + low

    def _low_and_span(self, key: str, value: Tensor) -> tuple[Float[Tensor, "... d"], Float[Tensor, "... d"]]:
        low, high = (self.statistics[key][name].to(value) for name in ("min", "max"))
        width = value.shape[-1]
        if low.shape[-1] != width:
            raise ValueError(f"{key} has {width} dimensions, but the checkpoint's statistics have {low.shape[-1]}")
        return low, high - low


@dataclass(frozen=True)
class ImageRule:
    """edge: side that an image is first scaled to; crop: share kept of its middle; target: (height, width) at last.

    area: scale by the shorter side and by area averages instead of to a square by bicubic interpolation, and end at
    the edge again. letterbox: make it square with black bars first.
    """

    edge: int
    crop: float
    target: tuple[int, int]
    area: bool = False
    letterbox: bool = False


@dataclass(frozen=True)
class Robot:
    """The robot side of one checkpoint.

    cameras: their names in order, None where the files have none. n_steps: how many steps of a chunk are the robot's,
    None for all. gripper: dimension of an action that goes from 0..1 to LIBERO's 1 (below 0.5) or -1; None: none does.
    unsupported: why raw observations cannot be handled, empty where they can.
    """

    embodiment: int
    images: ImageRule
    formal: bool
    normalizer: RangeNormalizer
    cameras: tuple[str, ...] | None = None
    n_steps: int | None = None
    gripper: int | None = None
    unsupported: str = ""

    def width(self, key: str) -> int | None:
        """Dimensions of state or action; None where there are no statistics."""
        return self.normalizer.statistics[key]["min"].shape[-1] if key in self.normalizer.statistics else None

    def decode(self, normalized: Float[Tensor, "batch step d_action"]) -> Float[Tensor, "batch step d_action"]:
        """Actions in the robot's units."""
        actions = self.normalizer.inverse(lerobot.ACTION, normalized)
        if self.gripper is not None:
            dimension = torch.arange(actions.shape[-1], device=actions.device)
            actions = torch.where(dimension == self.gripper % len(dimension), -torch.sign(2 * actions - 1), actions)
        return actions


def read_robot(spec: FeatureVLASpec, files: Mapping[str, bytes]) -> Robot:
    """The robot of LeRobot's processor files, else of NVIDIA's, else of the spec.

    Raises ValueError for an embodiment that the network has no weights for.
    """
    width, height = spec.features.resize or (224, 224)
    robot = Robot(spec.flow.embodiment, ImageRule(height, spec.chat.crop, (height, width)), spec.chat.formal,
                  RangeNormalizer({}))  # fmt: skip
    if lerobot.PREPROCESSOR in files:
        robot = _from_lerobot(robot, files)
    elif "processor_config.json" in files and isinstance(spec.vision, PatchVisionSpec):
        robot = _from_nvidia(robot, files)
    if not 0 <= robot.embodiment < spec.flow.n_embodiments:
        raise ValueError(
            f"the checkpoint's embodiment is {robot.embodiment}, but the network has {spec.flow.n_embodiments}; "
            "state another as embodiment in geometry.json"
        )
    return robot


def _from_lerobot(robot: Robot, files: Mapping[str, bytes]) -> Robot:
    steps = [
        step for file in (lerobot.PREPROCESSOR, lerobot.POSTPROCESSOR) if file in files
        for step in lerobot.processor_steps(files[file], file)
    ]  # fmt: skip
    statistics: dict[str, dict[str, Tensor]] = {}
    for step in steps:
        name, config = step.get("registry_name", ""), step.get("config") or {}
        if name in _PACK + _UNPACK and step.get("state_file") in files:
            for key, value in load(files[step["state_file"]]).items():
                feature, _, statistic = key.rpartition(".")
                statistics.setdefault(feature, {})[statistic] = value.float()
        if name in _PACK:
            ids = config.get("embodiment_mapping") or {}
            cameras = config.get("video_modality_keys")
            robot = replace(
                robot,
                embodiment=ids.get(config.get("embodiment_tag"), 0),
                formal=config.get("formalize_language", robot.formal),
                cameras=tuple(cameras) if cameras else None,
                unsupported=_several_frames(config.get("video_horizon")),
            )
            clip = config.get("clip_outliers", False)
            robot = replace(robot, normalizer=replace(robot.normalizer, clip_state=clip))
        elif name == _ENCODE:
            robot = replace(robot, images=_image_rule(robot.images, config))
        elif name == _DECODE:
            robot = _with_decoding(robot, config.get("modality_config") or {}, config.get("use_relative_action", False))
            robot = replace(robot, normalizer=replace(robot.normalizer, clip_action=True))
            if config.get("action_decode_transform"):
                robot = _with_gripper(robot, config)
        elif name in _UNPACK:
            clip = config.get("clip_normalized_action", False)
            robot = replace(robot, normalizer=replace(robot.normalizer, clip_action=clip))
            if config.get("libero_gripper_action"):
                binary = config.get("libero_gripper_binarize", True)
                robot = replace(robot, gripper=-1, unsupported=robot.unsupported if binary else "the checkpoint's "
                                "gripper is not binary, which is not supported")  # fmt: skip
    ranges = {key: each for key, each in statistics.items() if {"min", "max"} <= each.keys()}
    return replace(robot, normalizer=replace(robot.normalizer, statistics=ranges))


def _from_nvidia(robot: Robot, files: Mapping[str, bytes]) -> Robot:
    config = json.loads(files["processor_config.json"]).get("processor_kwargs") or {}
    modalities = config.get("modality_configs") or {}
    tag = "libero_sim" if "libero_sim" in modalities else next(iter(modalities)) if len(modalities) == 1 else None
    robot = replace(robot, images=_image_rule(robot.images, config), formal=config.get("formalize_language", True))
    if tag is None:
        return robot
    relative, percentiles = config.get("use_relative_action", False), config.get("use_percentiles", False)
    statistics = json.loads(files.get("statistics.json", b"{}")).get(tag) or {}
    ranges = {}
    for key, kind in ((lerobot.OBS_STATE, "state"), (lerobot.ACTION, "action")):
        groups = [statistics.get(kind, {}).get(name) for name in modalities[tag].get(kind, {}).get("modality_keys", [])]
        if groups and all(groups):
            ranges[key] = _joined(groups, ("q01", "q99") if percentiles else ("min", "max"))
    clip = config.get("clip_outliers", True)
    video = modalities[tag].get("video", {})
    robot = replace(
        robot,
        embodiment=json.loads(files.get("embodiment_id.json", b"{}")).get(tag, robot.embodiment),
        normalizer=RangeNormalizer({}, ranges, clip_state=clip, clip_action=True),
        cameras=tuple(video.get("modality_keys") or ()) or None,
        unsupported=_several_frames(len(video.get("delta_indices") or (0,))),
    )
    return _with_decoding(robot, modalities[tag], relative)


def _with_decoding(robot: Robot, modalities: Mapping[str, Any], relative: bool) -> Robot:
    action = modalities.get("action", {})
    kinds = [each.get("rep") for each in action.get("action_configs") or [] if isinstance(each, Mapping)]
    if relative and any(str(kind).lower().endswith("relative") for kind in kinds):
        robot = replace(robot, unsupported="the checkpoint's actions are relative to the state, which is not supported")
    return replace(robot, n_steps=len(action.get("delta_indices") or ()) or None)


def _with_gripper(robot: Robot, config: Mapping[str, Any]) -> Robot:
    transform, groups = config["action_decode_transform"], config["modality_config"]["action"]["modality_keys"]
    if transform != "libero" or "gripper" not in groups:
        why = f"the checkpoint's action_decode_transform={transform!r} over {groups} is not supported"
        return replace(robot, unsupported=why)
    widths = [len(config["raw_stats"]["action"][group]["min"]) for group in groups]
    return replace(robot, gripper=sum(widths[: groups.index("gripper")]))


def _joined(groups: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> dict[str, Tensor]:
    return {
        ours: torch.cat([torch.tensor(group[name], dtype=torch.float32).flatten() for group in groups])
        for ours, name in zip(("min", "max"), names, strict=True)
    }


def _several_frames(n: int | None) -> str:
    return "" if n in (None, 0, 1) else f"the model reads {n} frames of each camera, which is not supported"


def _image_rule(base: ImageRule, config: Mapping[str, Any]) -> ImageRule:
    """LeRobot's names; use_albumentations means OpenCV's area interpolation."""
    target = config.get("image_target_size")
    if not target:
        return base
    crop, size = config.get("crop_fraction"), config.get("image_crop_size")
    if crop is None:
        crop = size[0] / target[0] if size else 1.0
    return ImageRule(
        edge=config.get("shortest_image_edge") or target[0],
        crop=crop,
        target=(target[0], target[1]),
        area=bool(config.get("use_albumentations", False)),
        letterbox=bool(config.get("letter_box_transform", False)),
    )
