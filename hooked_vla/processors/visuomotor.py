"""Policies without language: one or several observation steps of images, state and environment state.

There are no tokens to tell a preprocessed batch by: an Observation is raw, a mapping is the public policy's own batch
and so past the checkpoint's preprocessor (its values are normalised, its actions come back normalised).
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from hooked_vla import lerobot
from hooked_vla.components.keypoints import image_size
from hooked_vla.inputs import ModelInputs, Observation, StepInputs
from hooked_vla.policy import Normalizer, Processor, observation_batch, read_normalizer, read_processor_features
from hooked_vla.spec import FeatureSpec, KeypointSpec, ResNetSpec

logger = logging.getLogger(__name__)


class VisuomotorProcessor(Processor):
    """Observation or LeRobot batch to StepInputs, and network actions back to the robot's units."""

    def __init__(self, features: FeatureSpec, normalizer: Normalizer) -> None:
        self.features, self.normalizer = features, normalizer

    @classmethod
    def from_files(
        cls,
        spec: Any,
        folder: Path | None,
        files: Mapping[str, bytes],
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> "VisuomotorProcessor":
        features = read_processor_features(spec.features, files)
        normalizer = read_normalizer(spec, files, statistics)
        modes = dict(normalizer.modes) | {lerobot.OBS_ENVIRONMENT: features.normalization.get("ENV", "IDENTITY")}
        for key, width in ((lerobot.OBS_STATE, features.d_state), (lerobot.OBS_ENVIRONMENT, features.d_environment)):
            if not width:
                del modes[key]
        bare = [key for key, mode in modes.items() if mode != "IDENTITY" and key not in normalizer.statistics]
        if bare and folder is not None:
            logger.warning("no statistics in the checkpoint for %s: their values pass unchanged", bare)
        return cls(features, replace(normalizer, modes=modes))

    def __call__(self, obs: Observation | Mapping[str, Any] | ModelInputs, device: torch.device) -> tuple[Any, bool]:
        """Inputs for the network, and whether the batch was raw (its actions are then to be un-normalised).

        Values of one step ([batch, ...]) stand for all n_obs_steps, as at the start of an episode; values of
        several steps are [batch, n_obs_steps, ...].
        Raises KeyError for a missing camera or entry, ValueError for one of the wrong shape, range or width or
        with NaN, TypeError for a wrong dtype; the message names the entry and what was expected.
        """
        if isinstance(obs, ModelInputs):
            return obs, False
        raw = isinstance(obs, Observation)
        batch = observation_batch(obs) if isinstance(obs, Observation) else obs
        if raw:
            batch = {self.features.rename.get(key, key): value for key, value in batch.items()}
        state = self._vector(batch, lerobot.OBS_STATE, self.features.d_state, raw)
        environment = self._vector(batch, lerobot.OBS_ENVIRONMENT, self.features.d_environment, raw)
        images = self._stacked_images(batch, raw)
        sizes = {len(each) for each in (state, environment, images) if each is not None}
        if len(sizes) > 1 or 0 in sizes:
            raise ValueError(f"the entries of the observation must have one number of rows, at least 1; got {sizes}")
        inputs = StepInputs(
            images=None if images is None else images.to(device),
            state=None if state is None else state.to(device),
            environment=None if environment is None else environment.to(device),
            cameras=self.features.cameras,
        )
        return inputs, raw

    def fit(self, images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image 3 new_height new_width"]:
        """Images at the size that the network reads."""
        return images

    def _vector(
        self, batch: Mapping[str, Any], key: str, width: int, raw: bool
    ) -> Float[Tensor, "batch step width"] | None:
        if not width:
            return None
        value = _entry(batch, key)
        if not value.is_floating_point():
            raise TypeError(f"{key} must be floating point, got {value.dtype}")
        if value.ndim not in (2, 3) or value.shape[-1] != width:
            raise ValueError(
                f"{key} must be [batch, {width}] or [batch, {self.features.n_obs_steps}, {width}], "
                f"got {list(value.shape)}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{key} has NaN or infinite values")
        value = self._steps(key, value, single_ndim=2).float()
        return self.normalizer(key, value) if raw else value

    def _stacked_images(
        self, batch: Mapping[str, Any], raw: bool
    ) -> Float[Tensor, "batch step camera 3 height width"] | None:
        cameras = self.features.cameras
        if not cameras:
            return None
        if lerobot.OBS_IMAGES in batch:
            images = _entry(batch, lerobot.OBS_IMAGES)
            if images.ndim != 6 or images.shape[2] != len(cameras):
                raise ValueError(
                    f"{lerobot.OBS_IMAGES} must be [batch, {self.features.n_obs_steps}, {len(cameras)}, 3, height, "
                    f"width], got {list(images.shape)}"
                )
            batch = {lerobot.image_key(camera): images[:, :, i] for i, camera in enumerate(cameras)}
        missing = [lerobot.image_key(camera) for camera in cameras if lerobot.image_key(camera) not in batch]
        if missing:
            raise KeyError(
                f"missing cameras: expected {missing} in the observation, which has "
                f"{sorted(key for key in batch if 'image' in key)}"
            )
        found = {camera: self._image(camera, _entry(batch, lerobot.image_key(camera)), raw) for camera in cameras}
        sizes = {camera: tuple(image.shape[-2:]) for camera, image in found.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"all cameras need one image size; got {sizes}")
        return torch.stack(list(found.values()), dim=2)

    def _image(self, camera: str, image: Tensor, raw: bool) -> Float[Tensor, "batch step 3 height width"]:
        key = lerobot.image_key(camera)
        image = self._steps(key, image, single_ndim=4)
        if image.ndim != 5 or image.shape[2] != 3:
            raise ValueError(f"camera {camera!r}: images must be [batch, 3, height, width], got {list(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(
                f"camera {camera!r}: images of a preprocessed batch must be floats, got {image.dtype}; "
                "pass raw images as an Observation"
            )
        if not image.isfinite().all():
            raise ValueError(f"camera {camera!r}: images have NaN or infinite values")
        low, high = image.aminmax()
        if raw and (low < 0 or high > 1):
            raise ValueError(f"camera {camera!r}: images must be in 0..1, got {float(low):g}..{float(high):g}")
        image = image.float()
        image = self.normalizer(key, image) if raw else image
        flat = self.fit(rearrange(image, "b s c h w -> (b s) c h w"))
        return rearrange(flat, "(b s) c h w -> b s c h w", s=self.features.n_obs_steps)

    def _steps(self, key: str, value: Tensor, single_ndim: int) -> Tensor:
        n = self.features.n_obs_steps
        if value.ndim == single_ndim:
            # in memory too: kernels for broadcast tensors round differently
            return repeat(value, "b ... -> b s ...", s=n).contiguous()
        if value.ndim != single_ndim + 1 or value.shape[1] != n:
            raise ValueError(f"{key} must have {n} observation steps along its second axis, got {list(value.shape)}")
        return value


class KeypointProcessor(VisuomotorProcessor):
    """The same for encoders that read images of one size: resized, then cropped in the middle."""

    def __init__(
        self, features: FeatureSpec, normalizer: Normalizer, vision: ResNetSpec, keypoints: KeypointSpec
    ) -> None:
        super().__init__(features, normalizer)
        self.size, self.resize = image_size(vision, keypoints), keypoints.resize

    @classmethod
    def from_files(
        cls,
        spec: Any,
        folder: Path | None,
        files: Mapping[str, bytes],
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> "KeypointProcessor":
        plain = VisuomotorProcessor.from_files(spec, folder, files, statistics)
        return cls(plain.features, plain.normalizer, spec.vision, spec.keypoints)

    def fit(self, images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image 3 new_height new_width"]:
        """Bilinear with antialiasing (torchvision's Resize), then a centre crop.

        Raises ValueError for images smaller than the crop.
        """
        if self.resize is not None and tuple(images.shape[-2:]) != self.resize:
            images = functional.interpolate(images, self.resize, mode="bilinear", align_corners=False, antialias=True)
        (height, width), (new_height, new_width) = images.shape[-2:], self.size
        if height < new_height or width < new_width:
            raise ValueError(f"images of {height} × {width} pixels, but the model reads {new_height} × {new_width}")
        # torchvision's CenterCrop: halves round to even
        top, left = round((height - new_height) / 2), round((width - new_width) / 2)
        return images[..., top : top + new_height, left : left + new_width]


def _entry(batch: Mapping[str, Any], key: str) -> Tensor:
    if key not in batch:
        raise KeyError(f"the observation has no {key!r}; it has {sorted(batch)}")
    return torch.as_tensor(batch[key])
