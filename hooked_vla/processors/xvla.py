"""X-VLA's inputs: images normalised by ImageNet's statistics, plain text, and each row's domain (robot embodiment)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vla import lerobot
from hooked_vla.inputs import DomainInputs, ModelInputs, Observation
from hooked_vla.policy import (
    Processor,
    Tokenizer,
    check_image,
    observation_batch,
    read_normalizer,
    read_processor_features,
)
from hooked_vla.spec import PromptedVLASpec

# LeRobot 0.6.1: utils/constants.py, IMAGENET_STATS
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# LeRobot's default entry for domains
_DOMAIN = "domain_id"


class PlainTokenizer(Tokenizer):
    """Instructions as they stand."""

    def __call__(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.encode(instructions)


class XVLAProcessor(Processor):
    """Observation or LeRobot batch to DomainInputs, and network actions back to the robot's units.

    domain: that of raw observations which name none; the checkpoint's preprocessor says it, else it is 0. Set it for
    another robot. imagenet: raw images are normalised by ImageNet's mean and standard deviation. to_axis_angle: raw
    observations get 7 values for the 20 of the network, as the checkpoint's postprocessor says.
    """

    def __init__(self, spec: PromptedVLASpec, folder: Path | None, files: Mapping[str, bytes],
                 statistics: Mapping[str, Mapping[str, Tensor]]) -> None:  # fmt: skip
        features = read_processor_features(spec.features, files)
        tokenizer = PlainTokenizer(features, folder, spec.vlm.d_vocab)
        normalizer = read_normalizer(spec, files, statistics)
        super().__init__(features, normalizer, tokenizer, spec.sampler.d_state, spec.vlm.d_vocab)
        self.n_domains, self.domain_key, self.pad_token = spec.expert.n_domains, spec.domain_key, spec.vlm.pad_token
        before, after = (_steps(files, file) for file in (lerobot.PREPROCESSOR, lerobot.POSTPROCESSOR))
        self.imagenet = before is None or "xvla_imagenet_normalize" in before
        self.domain = int((before or {}).get("xvla_add_domain_id", {}).get("domain_id", 0))
        self.to_axis_angle = "xvla_rotation_6d_to_axis_angle" in (after or {})

    @classmethod
    def from_files(
        cls,
        spec: PromptedVLASpec,
        folder: Path | None,
        files: Mapping[str, bytes],
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> "XVLAProcessor":
        return cls(spec, folder, files, statistics)

    def __call__(
        self, obs: Observation | Mapping[str, Any] | ModelInputs, device: torch.device
    ) -> tuple[ModelInputs, bool]:
        """As Processor's; also raises ValueError for a domain that the model does not have."""
        if isinstance(obs, ModelInputs):
            return obs, False
        batch = observation_batch(obs) if isinstance(obs, Observation) else obs
        inputs, raw = super().__call__(batch, device)
        domain = self._domain(batch, inputs.batch_size, self.domain if raw else 0)
        return DomainInputs(**vars(inputs), domain=domain.to(device)), raw

    def actions(self, padded: Float[Tensor, "batch step d_padded"], raw: bool) -> tuple[Tensor, Tensor]:
        chunk, normalized = super().actions(padded, raw)
        return (end_effector_actions(chunk) if raw and self.to_axis_angle else chunk), normalized

    def _text(self, obs: Mapping[str, Any], batch: int) -> tuple[Tensor, Tensor]:
        # the model attends to padding: a mask says no more than which tokens are padding
        if lerobot.OBS_TOKENS in obs and lerobot.OBS_TOKEN_MASK not in obs:
            obs = {**obs, lerobot.OBS_TOKEN_MASK: torch.as_tensor(obs[lerobot.OBS_TOKENS]) != self.pad_token}
        return super()._text(obs, batch)

    def _images(self, obs: Mapping[str, Any], batch: int, raw: bool) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """The cameras that are there: for those that are not, the network has tokens of zeros."""
        present, _ = self._cameras(obs)
        images, seen = [], []
        for camera in present:
            key = lerobot.image_key(camera)
            # past the checkpoint's preprocessor, normalised images have left 0..1
            image = check_image(camera, torch.as_tensor(obs[key]), batch, in_range=raw)
            if raw:
                image = self.normalizer(key, _by_imagenet(image) if self.imagenet else image)
            images.append(image if self.features.resize is None else self.resize(image, *self.features.resize))
            seen.append(self._seen(obs, camera, batch))
        sizes = {camera: tuple(image.shape[-2:]) for camera, image in zip(present, images, strict=True)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"without resizing, all cameras need one image size; got {sizes}")
        return torch.stack(images, dim=1), torch.stack(seen, dim=1), tuple(present)

    def _domain(self, obs: Mapping[str, Any], batch: int, default: int) -> Int[Tensor, " batch"]:
        key = self.domain_key if self.domain_key in obs else _DOMAIN
        domain = torch.as_tensor(obs.get(key, default))
        if domain.is_floating_point() or domain.numel() not in (1, batch):
            raise ValueError(f"{key!r} must be one integer, or one a row, got {domain.dtype} {list(domain.shape)}")
        if not 0 <= int(domain.min()) <= int(domain.max()) < self.n_domains:
            raise ValueError(f"{key!r} must be in 0..{self.n_domains - 1}, got {domain.tolist()}")
        return domain.long().flatten().expand(batch).cpu()


def _steps(files: Mapping[str, bytes], file: str) -> dict[str, dict[str, Any]] | None:
    """Name -> configuration of a processor file's steps; None where there is no file."""
    if file not in files:
        return None
    return {
        step.get("registry_name", ""): step.get("config") or {} for step in lerobot.processor_steps(files[file], file)
    }


def _by_imagenet(image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    mean, std = (torch.tensor(each).to(image)[:, None, None] for each in (_MEAN, _STD))
    return (image - mean) / std


def end_effector_actions(actions: Float[Tensor, "batch step d_action"]) -> Float[Tensor, "batch step 7"]:
    """Position, axis-angle, and the gripper as 1 (above 0.5) or -1, of the first arm (LeRobot: processor_xvla.py)."""
    angle = axis_angle(actions[..., 3:9])
    gripper = torch.where(actions[..., 9:10] > 0.5, 1.0, -1.0).to(actions)
    return torch.cat([actions[..., :3], angle, gripper], dim=-1)


def axis_angle(rotation_6d: Float[Tensor, "*rows 6"]) -> Float[Tensor, "*rows 3"]:
    """Axis times angle in radians, 0..π, of the rotation whose matrix begins with the given two columns.

    The columns are made orthonormal first (arXiv 1812.07035); the quaternion is the eigenvector of the largest
    eigenvalue of Bar-Itzhack's matrix, which suits matrices that are not quite orthonormal.
    """
    first, second = rotation_6d.double().split(3, dim=-1)
    # 1e-6: LeRobot 0.6.1, xvla/utils.py
    x = first / (first.norm(dim=-1, keepdim=True) + 1e-6)
    y = second - (x * second).sum(-1, keepdim=True) * x
    y = y / (y.norm(dim=-1, keepdim=True) + 1e-6)
    z = torch.linalg.cross(x, y)
    (a, d, g), (b, e, h), (c, f, i) = (column.unbind(-1) for column in (x, y, z))
    # rows of the symmetric matrix, for a quaternion (x, y, z, w) of the rotation [[a b c] [d e f] [g h i]]
    rows = [(a - e - i, d + b, g + c, h - f), (d + b, e - a - i, h + f, c - g), (g + c, h + f, i - a - e, d - b),
            (h - f, c - g, d - b, a + e + i)]  # fmt: skip
    matrix = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    quaternion = torch.linalg.eigh(matrix).eigenvectors[..., -1]
    quaternion = torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
    length = quaternion[..., :3].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(length, quaternion[..., 3:])
    return (quaternion[..., :3] / length.clamp(min=1e-12) * angle).to(rotation_6d)


PROCESSOR = XVLAProcessor
