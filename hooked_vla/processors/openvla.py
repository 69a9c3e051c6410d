"""OpenVLA's inputs: what its public processor makes (`input_ids`, `attention_mask`, `pixel_values`, and OFT's
normalised `proprio`), or raw observations.

Statistics are kept by dataset; `unnorm_key` chooses one. As in the public entry point, actions are always returned in
the robot's units. Crops, rotations and gripper conventions of an evaluation are the environment's business.
"""

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from hooked_vla import lerobot
from hooked_vla.inputs import ModelInputs, Observation, PromptedInputs
from hooked_vla.policy import Normalizer, Processor, Tokenizer, check_image, observation_batch, read_instructions
from hooked_vla.spec import LanguageVLASpec

INPUT_IDS, ATTENTION_MASK, PIXEL_VALUES, PROPRIO = "input_ids", "attention_mask", "pixel_values", "proprio"
# the answer, to be read instead of generated
ACTION_TOKENS = "action_tokens"
# keeps a range of one value from being divided by 0 (openvla-oft: experiments/robot/openvla_utils.py)
_EPS = 1e-8
# our name of a feature -> that of its statistics
_NAMES = {lerobot.ACTION: "action", lerobot.OBS_STATE: "proprio"}


@dataclass(frozen=True)
class DatasetNormalizer(Normalizer):
    """Values between two statistics of one data set go to -1..1, and what is beyond them to the ends; dimensions that
    the statistics mask out are left as they are (openvla: prismatic/vla/datasets/rlds/utils/data_utils.py).

    datasets: statistics by data set, then feature. bounds: names of the two. chosen: the data set, None for the only
    one; where there is none, values pass unchanged.
    """

    datasets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    bounds: tuple[str, str] = ("q01", "q99")
    chosen: str | None = None

    def __call__(self, key: str, value: Tensor) -> Tensor:
        if not (stats := self.stats(key)):
            return value
        low, high, mask = self._bounds(_NAMES[key], stats, value)
        return torch.where(mask, (2 * (value - low) / (high - low + _EPS) - 1).clamp(-1, 1), value)

    def inverse(self, key: str, value: Tensor) -> Tensor:
        """Undo the normalisation."""
        if not (stats := self.stats(key)):
            return value
        low, high, mask = self._bounds(_NAMES[key], stats, value)
        return torch.where(mask, 0.5 * (value + 1) * (high - low) + low, value)

    def stats(self, key: str) -> Mapping[str, Any]:
        """The chosen data set's statistics of a feature; {} where it has none.

        Raises ValueError where there are several data sets and none was chosen.
        """
        if self.chosen is None and len(self.datasets) > 1:
            raise ValueError(f"this checkpoint has statistics of several datasets: pass unnorm_key=, one of "
                             f"{sorted(self.datasets)}")  # fmt: skip
        dataset = self.datasets[self.chosen or next(iter(self.datasets))] if self.datasets else {}
        return dataset.get(_NAMES[key]) or {}

    def _bounds(self, feature: str, stats: Mapping[str, Any], value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        missing = [name for name in self.bounds if name not in stats]
        if missing:
            raise ValueError(f"the statistics of {feature!r} lack {missing}; they have {sorted(stats)}")
        low, high = (torch.as_tensor(stats[name], dtype=torch.float32) for name in self.bounds)
        mask = torch.as_tensor(stats.get("mask", [True] * len(low)), dtype=torch.bool)
        if len(low) != value.shape[-1]:
            raise ValueError(f"statistics of {feature!r} have {len(low)} dimensions, the model {value.shape[-1]}")
        return low.to(value.device), high.to(value.device), mask.to(value.device)


class OpenVLAProcessor(Processor):
    """A batch of the public entry point, or an observation, to PromptedInputs; actions back to the robot's units."""

    normalizer: DatasetNormalizer

    def __init__(
        self,
        spec: LanguageVLASpec,
        tokenizer: Tokenizer,
        statistics: Mapping[str, Any],
        means: Sequence[Sequence[float]],
        stds: Sequence[Sequence[float]],
    ) -> None:
        normalizer = DatasetNormalizer({}, datasets=statistics, bounds=spec.readout.bounds)
        super().__init__(spec.features, normalizer, tokenizer, spec.readout.d_state, spec.vlm.d_vocab or 0)
        self.spec = spec
        self.mean, self.std = torch.tensor(means).flatten(), torch.tensor(stds).flatten()

    @classmethod
    def from_files(
        cls,
        spec: LanguageVLASpec,
        folder: Path | None,
        files: Mapping[str, bytes],
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> "OpenVLAProcessor":
        """Statistics from dataset_statistics.json, or else config.json; of the channels from preprocessor_config.json.

        Raises ValueError for a way of resizing images that is not supported.
        """
        config = json.loads(files.get("config.json", b"{}"))
        by_dataset = config.get("norm_stats") or {}
        if "dataset_statistics.json" in files:
            by_dataset = json.loads(files["dataset_statistics.json"])
        images = json.loads(files.get("preprocessor_config.json", b"{}"))
        for option, only in (
            ("image_resize_strategy", "resize-naive"),
            ("interpolations", ["bicubic"] * len(spec.towers)),
        ):
            if images.get(option, only) != only:
                raise ValueError(f"preprocessor_config.json: {option}={images[option]!r} is not supported, only {only}")
        means = images.get("means", [tower.mean for tower in spec.towers.values()])
        stds = images.get("stds", [tower.std for tower in spec.towers.values()])
        return cls(spec, Tokenizer(spec.features, folder, spec.vlm.d_vocab or 0), by_dataset, means, stds)

    def with_key(self, unnorm_key: str) -> "OpenVLAProcessor":
        """The same processor with one dataset's statistics.

        Raises ValueError naming the known datasets for any other.
        """
        if unnorm_key not in self.normalizer.datasets:
            raise ValueError(f"unknown unnorm_key {unnorm_key!r}; known: {sorted(self.normalizer.datasets)}")
        chosen = copy(self)
        chosen.normalizer = replace(self.normalizer, chosen=unnorm_key)
        return chosen

    def __call__(
        self, obs: Observation | Mapping[str, Any] | ModelInputs, device: torch.device
    ) -> tuple[ModelInputs, bool]:
        """See Processor; actions are un-normalised for every batch but one of ready ModelInputs.

        Raises ValueError also where several datasets have statistics and no unnorm_key was given.
        """
        if isinstance(obs, ModelInputs):
            return obs, False
        self.normalizer.stats(lerobot.ACTION)
        if isinstance(obs, Observation):
            # a model that reads no state takes observations with any, or none
            obs = observation_batch(obs if self.d_state else replace(obs, state=torch.zeros(1, 0)))
        raw = INPUT_IDS not in obs
        images, image_mask = self._raw_images(obs) if raw else self._pixels(obs)
        batch, n_images = images.shape[:2]
        ids = self._prompts(read_instructions(obs, batch)) if raw else self._ids(obs, batch)
        tokens, token_mask = self._padded([row if row[-1] == self.spec.prompt.end else [*row, self.spec.prompt.end]
                                           for row in ids])  # fmt: skip
        state = self._proprio(obs, batch, raw) if self.d_state else torch.zeros(batch, 0)
        answer = self._answer(obs, batch)
        inputs = PromptedInputs(
            images=images.to(device),
            image_mask=image_mask.to(device),
            tokens=tokens.to(device),
            token_mask=token_mask.to(device),
            state=state.to(device),
            cameras=self._cameras(n_images),
            action_tokens=None if answer is None else answer.to(device),
        )
        return inputs, True

    def actions(self, padded: Float[Tensor, "batch step d_action"], raw: bool) -> tuple[Tensor, Tensor]:
        """In the robot's units where `raw`, and normalised. Dimensions that the statistics mask out are not scaled."""
        return (self.normalizer.inverse(lerobot.ACTION, padded) if raw else padded), padded

    def _proprio(self, obs: Mapping[str, Any], batch: int, raw: bool) -> Float[Tensor, "batch d_state"]:
        key = lerobot.OBS_STATE if raw else PROPRIO
        if key not in obs:
            raise KeyError(f"the observation has no {key!r}; it has {sorted(obs)}")
        state = torch.as_tensor(obs[key]).float()
        if state.numel() != batch * self.d_state:
            raise ValueError(f"{key!r} must be [{batch}, {self.d_state}], got {list(state.shape)}")
        if not state.isfinite().all():
            raise ValueError(f"{key!r} has NaN or infinite values")
        state = state.reshape(batch, self.d_state)
        if not raw or not self.normalizer.stats(lerobot.OBS_STATE):
            return state
        # of the state, what is not scaled is cut off too
        return self.normalizer(lerobot.OBS_STATE, state).clamp(-1, 1)

    def _answer(self, obs: Mapping[str, Any], batch: int) -> Int[Tensor, "batch token"] | None:
        if ACTION_TOKENS not in obs:
            return None
        readout = self.spec.readout
        answer, wanted = torch.as_tensor(obs[ACTION_TOKENS]), (batch, readout.chunk * readout.d_action)
        if readout.kind != "generate":
            raise ValueError(f"{ACTION_TOKENS!r}: this model does not generate tokens one after another")
        if answer.is_floating_point() or answer.shape != wanted or not 0 <= answer.min() <= answer.max() < self.d_vocab:
            raise ValueError(f"{ACTION_TOKENS!r} must be ids {list(wanted)} in 0..{self.d_vocab - 1}, got {answer}")
        return answer.long()

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer, rows = self.tokenizer.load(), []
        for text in texts:
            ids = list(tokenizer(self.spec.prompt.template.format(text.lower()))["input_ids"])
            row = ids if ids[:1] == [self.spec.prompt.start] else [self.spec.prompt.start, *ids]
            if len(row) > self.features.max_text or max(row) >= self.d_vocab:
                raise ValueError(
                    f"prompt of {len(row)} tokens up to id {max(row)}, but the model takes {self.features.max_text} "
                    f"tokens and knows {self.d_vocab} ids: {text!r}"
                )
            rows.append(row)
        return rows

    def _ids(self, obs: Mapping[str, Any], batch: int) -> list[list[int]]:
        """The rows of `input_ids` without padding. The mask may end before ids that were appended to the prompt."""
        ids = torch.as_tensor(obs[INPUT_IDS])
        if ids.is_floating_point() or ids.ndim != 2 or len(ids) != batch:
            raise ValueError(f"{INPUT_IDS!r} must be integers [{batch}, text], got {ids.dtype} {list(ids.shape)}")
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.d_vocab:
            raise ValueError(f"{INPUT_IDS!r} must be ids in 0..{self.d_vocab - 1}")
        mask = torch.as_tensor(obs.get(ATTENTION_MASK, torch.ones_like(ids))).bool()
        if mask.ndim != 2 or len(mask) != batch or not 0 <= ids.shape[1] - mask.shape[1] <= 1:
            raise ValueError(f"{ATTENTION_MASK!r} must be {list(ids.shape)}, got {list(mask.shape)}")
        mask = functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=True)
        if not mask.any(1).all():
            raise ValueError(f"{ATTENTION_MASK!r} hides a whole prompt")
        return [row[seen].tolist() for row, seen in zip(ids, mask, strict=True)]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch text"], Bool[Tensor, "batch text"]]:
        longest, length = max(len(row) for row in rows), self.features.max_text
        if self.features.pad_text != "max_length":
            length = longest
        elif longest > length:
            raise ValueError(f"prompt of {longest} tokens, but the model takes {length}")
        tokens = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
        mask = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
        return tokens, mask

    def _pixels(self, obs: Mapping[str, Any]) -> tuple[Tensor, Bool[Tensor, "batch camera"]]:
        """`pixel_values`: the images' channels one after the other, those of each image for one tower after another."""
        if PIXEL_VALUES not in obs:
            raise KeyError(f"the batch has no {PIXEL_VALUES!r}; it has {sorted(obs)}")
        pixels, channels, side = torch.as_tensor(obs[PIXEL_VALUES]), len(self.mean), self._side
        if pixels.ndim != 4 or not pixels.shape[1] or pixels.shape[1] % channels or pixels.shape[2:] != (side, side):
            wanted = f"[batch, {channels} for each image, {side}, {side}]"
            raise ValueError(f"{PIXEL_VALUES!r} must be {wanted}, got {list(pixels.shape)}")
        if len(pixels) == 0:
            raise ValueError("empty batch: the observation has 0 rows")
        if not pixels.isfinite().all():
            raise ValueError(f"{PIXEL_VALUES!r} has NaN or infinite values")
        images = rearrange(pixels.float(), "b (n c) h w -> b n c h w", c=channels)
        return images, torch.ones(images.shape[:2], dtype=torch.bool)

    def _raw_images(self, obs: Mapping[str, Any]) -> tuple[Tensor, Bool[Tensor, "batch camera"]]:
        keys = {camera: lerobot.image_key(camera) for camera in self.features.cameras}
        missing = [key for key in keys.values() if key not in obs]
        if missing:
            raise KeyError(f"missing cameras: expected {missing} in the observation, which has {sorted(obs)}")
        images, seen = [], []
        for camera, key in keys.items():
            image = torch.as_tensor(obs[key])
            image = check_image(camera, image, len(image), in_range=True)
            levels = resize_levels((image * 255).round(), self._side)
            stacked = (levels / 255).repeat(1, len(self.spec.towers), 1, 1)
            images.append((stacked - self.mean[:, None, None]) / self.std[:, None, None])
            mask = obs.get(lerobot.image_mask_key(camera), torch.ones(len(image)))
            seen.append(torch.as_tensor(mask).bool().cpu())
        if len({len(image) for image in images}) > 1 or not len(images[0]):
            raise ValueError(f"cameras need one number of images, at least 1; got {[len(image) for image in images]}")
        return torch.stack(images, dim=1), torch.stack(seen, dim=1)

    def _cameras(self, n_images: int) -> tuple[str, ...]:
        names = self.features.cameras
        if self.spec.readout.kind == "generate" and n_images != len(names):
            raise ValueError(
                f"{n_images} images, but the model reads {list(names)}; a checkpoint trained on others names them as "
                '"cameras" in geometry.json'
            )
        return (*names[:n_images], *(f"camera{i + 1}" for i in range(len(names), n_images)))

    @property
    def _side(self) -> int:
        return next(iter(self.spec.towers.values())).image_size


def resize_levels(images: Float[Tensor, "batch 3 height width"], side: int) -> Float[Tensor, "batch 3 side side"]:
    """Pillow's bicubic resize of images in whole levels 0..255: rows first, and whole levels again after each pass."""
    for size in ((images.shape[2], side), (side, side)):
        if images.shape[2:] != size:
            resized = functional.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)
            images = resized.round().clamp(0, 255)
    return images


PROCESSOR = OpenVLAProcessor
