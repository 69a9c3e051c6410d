"""Diffusion Policy with a U-Net. No tokens: keypoints of the last images, with states, make one condition vector, and a
1-D U-Net over the action steps denoises under it; the expert is that U-Net.

Wiring read from LeRobot 0.6.1, policies/diffusion, and from real-stanford/diffusion_policy. Surprises: FiLM multiplies
by the scale itself, not 1 + scale; the first level's skip connection is never read; a chunk starts at the present step,
so what is denoised before it is thrown away.
"""

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vla.components.denoising import DiffusionHead, noise_schedule
from hooked_vla.components.keypoints import (
    CameraTowers,
    FeatureConnector,
    KeypointResNet,
    encoder_segments,
    image_size,
)
from hooked_vla.components.losses import check_targets, mean_of_draws, mean_of_steps
from hooked_vla.components.unet1d import FINAL_GROUPS, UNet1d, level_stream
from hooked_vla.hooks.point import Run
from hooked_vla.inputs import ACTION, Draws, Segments, StepInputs, image_segment
from hooked_vla.lerobot import read_step_features, write_step_features
from hooked_vla.models.network import Network, pixels
from hooked_vla.models.sizes import layer_count, resnet_from_shapes, resnet_name
from hooked_vla.spec import DiffusionPolicySpec, KeypointSpec, ResNetSpec, SamplerSpec, UNetSpec


class DiffusionPolicy(Network):
    """The whole network: images, states and noise to the normalised actions that are executed."""

    def __init__(self, spec: DiffusionPolicySpec) -> None:
        super().__init__()
        self.spec, features = spec, spec.features
        n_cameras, d_keypoints = len(features.cameras), 2 * spec.keypoints.n_keypoints
        if n_cameras:

            def encoder(stream: str) -> KeypointResNet:
                return KeypointResNet(spec.vision, spec.keypoints, stream)

            def connector(stream: str) -> FeatureConnector:
                return FeatureConnector(d_keypoints, stream)

            one_each = spec.encoder_per_camera
            self.vision = CameraTowers(encoder, n_cameras, "vision") if one_each else encoder("vision")
            self.connector = CameraTowers(connector, n_cameras, "connector") if one_each else connector("connector")
        d_step = features.d_state + n_cameras * d_keypoints + features.d_environment
        self.expert = UNet1d(
            spec.unet, features.d_action, spec.horizon, features.n_obs_steps * d_step,
            predicts_noise=spec.sampler.prediction == "epsilon",
        )  # fmt: skip
        start = features.n_obs_steps - 1
        chunk = min(features.n_action_steps, spec.horizon - start)
        self.head = DiffusionHead(spec.sampler, spec.horizon, start, chunk, features.d_action)

    @property
    def n_denoise_steps(self) -> int:
        return len(self.head.steps)

    @property
    def dead_ends(self) -> list[str]:
        return []

    def condition(self, inputs: StepInputs) -> Float[Tensor, "batch d_condition"]:
        """State, image features in camera order and environment state of each observation step, oldest step first."""
        assert inputs.state is not None
        dtype = self.expert.time_mlp_in.weight.dtype
        parts = [inputs.state.to(dtype)]
        if self.spec.features.cameras:
            keypoints = self.vision_features(inputs)
            _, n_steps, n_cameras = keypoints.shape[:3]
            features = self.connector(rearrange(keypoints, "b s n d -> (b s n) d"))
            parts.append(rearrange(features.to(dtype), "(b s n) d -> b s (n d)", s=n_steps, n=n_cameras))
        if inputs.environment is not None:
            parts.append(inputs.environment.to(dtype))
        return rearrange(torch.cat(parts, dim=-1), "b s d -> b (s d)")

    def sample_actions(self, inputs: StepInputs, draws: Draws, run: Run) -> Float[Tensor, "batch chunk d_action"]:
        """What is seen once, then the U-Net at every denoise step; the starting noise and DDPM's noises are drawn."""
        condition = self.condition(inputs)
        return self.head(
            inputs.batch_size, draws, lambda x, time: self.expert(x, time, condition),
            self.expert.hook_clean_actions, run,
        )  # fmt: skip

    def training_loss(
        self,
        inputs: StepInputs,
        actions: Float[Tensor, "batch horizon d_action"],
        valid: Bool[Tensor, "batch horizon"] | None,
        draws: Draws,
        run: Run,
        n_draws: int = 1,
    ) -> Float[Tensor, " batch"]:
        """As Network's, but the targets are all `horizon` steps that the U-Net denoises, from the oldest observation's
        on; drawn: noise, then each row's training step, integers [batch]. The condition is computed once a row."""
        batch, spec = inputs.batch_size, self.spec
        check_targets(actions, valid, (batch, spec.horizon, spec.features.d_action), n_draws)
        condition = repeat(self.condition(inputs), "b d -> (n b) d", n=n_draws)
        valid = None if valid is None else repeat(valid, "b t -> (n b) t", n=n_draws)
        with self.inputs_replaced(lambda: inputs.rows(list(range(batch)) * n_draws), run):
            losses = self.head.losses(actions, draws, n_draws, lambda x, time: self.expert(x, time, condition))
        return mean_of_draws(mean_of_steps(losses, valid), n_draws)

    def see(self, inputs: StepInputs) -> Float[Tensor, "batch step camera d_keypoints"]:
        """The keypoints of every image: there are no places beside them."""
        images = pixels(inputs)
        keypoints = self.vision(rearrange(images, "b s n c h w -> (b s n) c h w"))
        return rearrange(keypoints, "(b s n) d -> b s n d", s=images.shape[1], n=images.shape[2])

    @property
    def d_features(self) -> int:
        return 2 * self.spec.keypoints.n_keypoints

    def segments(self, inputs: StepInputs) -> dict[str, Segments]:
        """Token segments of every stream."""
        batch, found = inputs.batch_size, dict[str, Segments]()
        if self.spec.features.cameras:
            names = tuple(image_segment(camera) for camera in inputs.cameras)
            n_images = batch * self.spec.features.n_obs_steps
            found = encoder_segments(self.vision, names, n_images, *image_size(self.spec.vision, self.spec.keypoints))
        for level in range(len(self.spec.unet.widths)):
            n_steps = self.spec.horizon // 2**level
            found[level_stream(level)] = Segments.from_spans([(ACTION, n_steps)], batch)
        return found


NETWORK = DiffusionPolicy

_UNET = "diffusion.unet."


def read_spec(base: DiffusionPolicySpec, checkpoint: Any) -> DiffusionPolicySpec:
    """`base` with the sizes and options of a LeRobot checkpoint (weights.Checkpoint).

    Raises ValueError for options that are not supported and for sizes that do not fit together.
    """
    config = checkpoint.config
    features = read_step_features(config, base.features)
    if not features.d_state:
        raise ValueError("config.json has no observation.state, which the policy conditions on")
    unet = _read_unet(base.unet, checkpoint)
    horizon = config.get("horizon", base.horizon)
    if horizon % 2 ** len(unet.widths):
        raise ValueError(
            f"horizon {horizon} is not a multiple of 2^{len(unet.widths)}, by its {len(unet.widths)} levels"
        )
    per_camera = any(key.startswith("diffusion.rgb_encoder.0.") for key in checkpoint.tensors)
    vision, keypoints = base.vision, base.keypoints
    if features.cameras:
        prefix = "diffusion.rgb_encoder.0." if per_camera else "diffusion.rgb_encoder."
        norm = "batch" if f"{prefix}backbone.1.running_mean" in checkpoint.tensors else "group"
        vision = resnet_from_shapes(base.vision, checkpoint, f"{prefix}backbone.", ("4", "5", "6", "7"), norm)
        keypoints = read_keypoints(checkpoint, prefix)
    return replace(
        base, features=features, vision=vision, keypoints=keypoints, encoder_per_camera=per_camera, unet=unet,
        sampler=_read_sampler(base.sampler, config), horizon=horizon,
    )  # fmt: skip


def read_keypoints(checkpoint: Any, prefix: str) -> KeypointSpec:
    """Spatial softmax and image sizes of an encoder whose keys start with `prefix`."""
    config = checkpoint.config
    resize, crop = config.get("resize_shape"), config.get("crop_shape")
    if resize:
        # LeRobot: with a resize, only the ratio decides about the crop
        ratio = config.get("crop_ratio", 1.0)
        crop = (int(resize[0] * ratio), int(resize[1] * ratio)) if ratio < 1 else None
    return KeypointSpec(
        n_keypoints=checkpoint.shape(f"{prefix}pool.nets.weight")[0],
        resize=(resize[0], resize[1]) if resize else None,
        crop=(crop[0], crop[1]) if crop else None,
    )


def _read_unet(base: UNetSpec, checkpoint: Any) -> UNetSpec:
    config, shape = checkpoint.config, checkpoint.shape
    levels = range(layer_count(checkpoint, f"{_UNET}down_modules."))
    widths = tuple(shape(f"{_UNET}down_modules.{i}.0.conv1.block.0.weight")[0] for i in levels)
    n_groups = config.get("n_groups", base.n_groups)
    if any(width % n_groups for width in widths) or widths[0] % FINAL_GROUPS:
        raise ValueError(
            f"U-Net widths {list(widths)} must all divide into {n_groups} groups (n_groups in config.json), the first "
            f"into {FINAL_GROUPS} too"
        )
    return UNetSpec(
        widths=widths,
        kernel_size=shape(f"{_UNET}down_modules.0.0.conv1.block.0.weight")[2],
        n_groups=n_groups,
        d_time=shape(f"{_UNET}diffusion_step_encoder.1.weight")[1],
        film_scale=shape(f"{_UNET}down_modules.0.0.cond_encoder.1.weight")[0] == 2 * widths[0],
    )


def _read_sampler(base: SamplerSpec, config: dict[str, Any]) -> SamplerSpec:
    n_train = config.get("num_train_timesteps", base.n_train_steps)
    sampler = SamplerSpec(
        kind=config.get("noise_scheduler_type", "DDPM").lower(),
        n_train_steps=n_train,
        n_steps=config.get("num_inference_steps") or n_train,
        schedule=config.get("beta_schedule", base.schedule),
        beta_start=config.get("beta_start", base.beta_start),
        beta_end=config.get("beta_end", base.beta_end),
        prediction=config.get("prediction_type", base.prediction),
        clip=config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else None,
    )
    if sampler.prediction not in ("epsilon", "sample"):
        raise ValueError(f"config.json sets prediction_type={sampler.prediction!r}; supported: epsilon, sample")
    noise_schedule(sampler)
    return sampler


def write_encoder_config(vision: ResNetSpec, keypoints: KeypointSpec) -> dict[str, Any]:
    """The fields of config.json that say how images are encoded."""
    config: dict[str, Any] = {
        "vision_backbone": resnet_name(vision),
        "pretrained_backbone_weights": None,
        "crop_shape": list(keypoints.crop) if keypoints.crop else None,
        "use_group_norm": vision.norm == "group",
        "spatial_softmax_num_keypoints": keypoints.n_keypoints,
    }
    if keypoints.resize:
        ratio = keypoints.crop[0] / keypoints.resize[0] if keypoints.crop else 1.0
        config |= {"resize_shape": list(keypoints.resize), "crop_ratio": ratio}
    return config


def write_config(spec: DiffusionPolicySpec) -> dict[str, Any]:
    """A LeRobot config.json for a network that no checkpoint was read for."""
    sampler, unet = spec.sampler, spec.unet
    return {
        "type": spec.config_type,
        **write_step_features(spec.features, spec.vision.image_size),
        **write_encoder_config(spec.vision, spec.keypoints),
        "use_separate_rgb_encoder_per_camera": spec.encoder_per_camera,
        "horizon": spec.horizon,
        "down_dims": list(unet.widths),
        "kernel_size": unet.kernel_size,
        "n_groups": unet.n_groups,
        "diffusion_step_embed_dim": unet.d_time,
        "use_film_scale_modulation": unet.film_scale,
        "noise_scheduler_type": sampler.kind.upper(),
        "num_train_timesteps": sampler.n_train_steps,
        "num_inference_steps": sampler.n_steps,
        "beta_schedule": sampler.schedule,
        "beta_start": sampler.beta_start,
        "beta_end": sampler.beta_end,
        "prediction_type": sampler.prediction,
        "clip_sample": sampler.clip is not None,
        "clip_sample_range": sampler.clip or 1.0,
    }
