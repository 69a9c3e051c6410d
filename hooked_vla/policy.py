"""From observations to network inputs and from network outputs to actions, as the checkpoint says.

Normalisation, image preprocessing, prompt and tokenization live here. A raw observation (with an instruction) gets
all of them; a batch that carries token ids is already past the checkpoint's preprocessor, as in LeRobot, so its
state is taken as normalised and the actions are returned normalised.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional

from hooked_vla import lerobot
from hooked_vla.inputs import ModelInputs, Observation, VLAInputs
from hooked_vla.spec import FeatureSpec, ModelSpec

logger = logging.getLogger(__name__)

# mode -> (statistic subtracted, statistic that ends the range); LeRobot: processor/normalize_processor.py
_RANGES = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
_ROUNDING = 1e-3
# one class, as transformers 4 and 5 call it: all of the tokenizer is in tokenizer.json
_GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True)
class Normalizer:
    """LeRobot's normalisation: per feature a mode and its statistics; a feature without statistics passes unchanged.

    MEAN_STD: (x - mean) / (std + eps). MIN_MAX, QUANTILES, QUANTILE10: the range goes to -1..1.
    """

    modes: Mapping[str, str]
    statistics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    eps: float = 1e-8

    def __call__(self, key: str, value: Tensor) -> Tensor:
        mode, stats = self.modes.get(key, "IDENTITY"), self._stats(key, value)
        if mode == "IDENTITY" or not stats:
            return value
        if mode == "MEAN_STD":
            return (value - stats["mean"]) / (stats["std"] + self.eps)
        low, span = self._range(key, mode, stats)
        return 2 * (value - low) / span - 1

    def inverse(self, key: str, value: Tensor) -> Tensor:
        """Undo the normalisation."""
        mode, stats = self.modes.get(key, "IDENTITY"), self._stats(key, value)
        if mode == "IDENTITY" or not stats:
            return value
        if mode == "MEAN_STD":
            return value * stats["std"] + stats["mean"]
        low, span = self._range(key, mode, stats)
        return (value + 1) / 2 * span + low

    def _stats(self, key: str, value: Tensor) -> dict[str, Tensor]:
        return {name: each.to(value) for name, each in self.statistics.get(key, {}).items()}

    def _range(self, key: str, mode: str, stats: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if mode not in _RANGES:
            raise ValueError(f"unknown normalisation {mode!r} for {key!r}; known: MEAN_STD, {', '.join(_RANGES)}")
        low, high = (stats[name] for name in _RANGES[mode])
        span = high - low
        return low, torch.where(span == 0, torch.full_like(span, self.eps), span)


def read_normalizer(
    spec: ModelSpec, files: Mapping[str, bytes], statistics: Mapping[str, Mapping[str, Tensor]]
) -> Normalizer:
    """Modes from LeRobot's processor files, else the spec's features; statistics from the processor files or, in
    older layouts, from among the weights.

    Raises ValueError when a processor file names statistics that are missing or damaged.
    """
    features = spec.features
    stated = dict(features.normalization)
    # a feature that the older layout had no statistics for stands there with infinite ones
    values = {
        key: dict(each) for key, each in statistics.items() if all(bool(v.isfinite().all()) for v in each.values())
    }
    eps = Normalizer.eps
    for file in (lerobot.PREPROCESSOR, lerobot.POSTPROCESSOR):
        for step in lerobot.processor_steps(files[file], file) if file in files else []:
            if step.get("registry_name") not in ("normalizer_processor", "unnormalizer_processor"):
                continue
            eps = step["config"].get("eps", eps)
            stated |= step["config"].get("norm_map") or {}
            for name, value in _state(step, files, file).items():
                feature, _, statistic = name.rpartition(".")
                values.setdefault(feature, {})[statistic] = value
    modes = {lerobot.image_key(c): stated.get("VISUAL", "IDENTITY") for c in features.cameras}
    modes[lerobot.OBS_STATE] = stated.get("STATE", "IDENTITY")
    modes[lerobot.ACTION] = stated.get("ACTION", "IDENTITY")
    return Normalizer(modes, values, eps)


def _state(step: Mapping[str, Any], files: Mapping[str, bytes], file: str) -> dict[str, Tensor]:
    """Tensors of a processor step; none where it names no file."""
    name = step.get("state_file")
    if name is None:
        return {}
    if name not in files:
        raise ValueError(f"{file} names {name!r}, which is not in the checkpoint")
    try:
        return load(files[name])
    except SafetensorError as error:
        raise ValueError(f"{name} is truncated or not a safetensors file: {error}") from error


def read_processor_features(features: FeatureSpec, files: Mapping[str, bytes]) -> FeatureSpec:
    """`features` with what the checkpoint's own preprocessor says of names and text, where it has one."""
    steps = (
        lerobot.processor_steps(files[lerobot.PREPROCESSOR], lerobot.PREPROCESSOR)
        if lerobot.PREPROCESSOR in files
        else []
    )
    for step in steps:
        config = step.get("config", {})
        if step.get("registry_name") == "rename_observations_processor":
            features = replace(features, rename=dict(config.get("rename_map") or {}))
        if step.get("registry_name") == "tokenizer_processor":
            features = replace(
                features,
                tokenizer=config.get("tokenizer_name") or features.tokenizer,
                max_text=config.get("max_length", features.max_text),
                pad_text=config.get("padding", features.pad_text),
            )
    return features


class Tokenizer:
    """Instruction text to padded ids, by the tokenizer that the checkpoint brings or names; loaded on first use."""

    def __init__(self, features: FeatureSpec, folder: Path | None, d_vocab: int) -> None:
        self.features, self.folder, self.d_vocab = features, folder, d_vocab
        self._tokenizer: Any = None

    def __call__(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids [B, text] and mask [B, text] of instructions, each with a newline at its end.

        Raises ValueError as `encode`.
        """
        return self.encode([text if text.endswith("\n") else f"{text}\n" for text in instructions])

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids [B, text] and mask [B, text] of whole prompts.

        Raises ValueError for a prompt of more tokens than the model was made for, or of ids it does not know.
        """
        tokenizer = self.load()
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        for text, each in zip(prompts, ids, strict=True):
            if len(each) > self.features.max_text:
                raise ValueError(
                    f"instruction of {len(each)} tokens, but the model takes {self.features.max_text}: {text!r}"
                )
            if max(each, default=0) >= self.d_vocab:
                raise ValueError(
                    f"the tokenizer made id {max(each)} of {text!r}, but the model knows {self.d_vocab} ids"
                )
        longest = max(len(each) for each in ids)
        length = self.features.max_text if self.features.pad_text == "max_length" else longest
        padded = torch.full((len(ids), length), tokenizer.pad_token_id or 0, dtype=torch.long)
        mask = torch.zeros(len(ids), length, dtype=torch.bool)
        for row, each in enumerate(ids):
            padded[row, : len(each)] = torch.tensor(each, dtype=torch.long)
            mask[row, : len(each)] = True
        return padded, mask

    def load(self) -> Any:
        """The Hugging Face tokenizer.

        Raises OSError saying where it was looked for.
        """
        if self._tokenizer is None:
            self._tokenizer = byte_tokenizer() if self.features.tokenizer == "bytes" else self._from_files()
        return self._tokenizer

    def _from_files(self) -> Any:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        named = self.features.tokenizer
        places = [] if self.folder is None else [self.folder, self.folder / named]
        local = [place for place in places if any(place.glob("tokenizer*.json"))]
        source = str(local[0]) if local else named
        try:
            # AutoTokenizer reads config.json too, and warns of families that it does not know
            generic = bool(local) and _tokenizer_class(local[0]) in _GENERIC_TOKENIZERS
            return (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(source)
        except (OSError, ValueError) as error:
            raise OSError(
                f"no tokenizer in {[str(place) for place in places]} and none from the hub under {named!r}; "
                f"put its files beside config.json, or pass token ids as {lerobot.OBS_TOKENS!r} and "
                f"{lerobot.OBS_TOKEN_MASK!r}"
            ) from error


def _tokenizer_class(folder: Path) -> str | None:
    """What a folder says that its tokenizer is, None where it does not."""
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text()).get("tokenizer_class") if path.is_file() else None


def byte_tokenizer() -> Any:
    """One token a UTF-8 byte, then id 256 for padding: for small models that bring no vocabulary."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<pad>"] = len(vocabulary)
    tokenizer = FastTokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def resize_with_pad(
    images: Float[Tensor, "batch 3 height width"], width: int, height: int
) -> Float[Tensor, "batch 3 new_height new_width"]:
    """Scale to fit, keeping the aspect, and pad with 0 on the left and top (LeRobot: vla_utils.resize_with_pad)."""
    old_height, old_width = images.shape[-2:]
    if (old_height, old_width) == (height, width):
        return images
    ratio = max(old_width / width, old_height / height)
    size = (int(old_height / ratio), int(old_width / ratio))
    if not min(size):
        raise ValueError(f"images of {old_height} × {old_width} pixels vanish when fitted into {height} × {width}")
    fitted = functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return functional.pad(fitted, (width - size[1], 0, height - size[0], 0))


class Processor:
    """Observation or LeRobot batch to VLAInputs, and network actions back to the robot's units.

    A family whose public entry point takes something else subclasses this in processors/<family>.py.
    d_state: padded width that the network takes. d_vocab: number of token ids it knows.
    """

    resize = staticmethod(resize_with_pad)

    def __init__(
        self, features: FeatureSpec, normalizer: Normalizer, tokenizer: Tokenizer, d_state: int, d_vocab: int
    ) -> None:
        self.features, self.normalizer, self.tokenizer = features, normalizer, tokenizer
        self.d_state, self.d_vocab = d_state, d_vocab

    @classmethod
    def from_files(
        cls,
        spec: Any,
        folder: Path | None,
        files: Mapping[str, bytes],
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> "Processor":
        """The processor of a checkpoint: its small files by name, and statistics found among its weights."""
        features = read_processor_features(spec.features, files)
        normalizer = read_normalizer(spec, files, statistics)
        bare = [key for key, m in normalizer.modes.items() if m != "IDENTITY" and key not in normalizer.statistics]
        if bare and folder is not None:
            logger.warning("no statistics in the checkpoint for %s: their values pass unchanged", bare)
        tokenizer = Tokenizer(features, folder, spec.vlm.d_vocab)
        return cls(features, normalizer, tokenizer, cls.state_width(spec), spec.vlm.d_vocab)

    @staticmethod
    def state_width(spec: Any) -> int:
        """Padded width of the state that the network takes."""
        return spec.flow.d_state

    def __call__(self, obs: Observation | Mapping[str, Any] | ModelInputs, device: torch.device) -> tuple[Any, bool]:
        """Inputs for the network, and whether the batch was raw (its actions are then to be un-normalised).

        Raises KeyError for a missing camera or entry, ValueError for one of the wrong shape, range or width or
        with NaN, TypeError for a wrong dtype; the message names the entry and what was expected.
        """
        if isinstance(obs, ModelInputs):
            return obs, False
        if isinstance(obs, Observation):
            obs = observation_batch(obs)
        raw = lerobot.OBS_TOKENS not in obs
        if raw:
            obs = {self._renamed(key): value for key, value in obs.items()}
        state = self._state(obs)
        state = self.normalizer(lerobot.OBS_STATE, state) if raw else state
        tokens, token_mask = self._text(obs, batch=state.shape[0])
        images, image_mask, cameras = self._images(obs, batch=state.shape[0], raw=raw)
        inputs = VLAInputs(
            images=images.to(device),
            image_mask=image_mask.to(device),
            tokens=tokens.to(device),
            token_mask=token_mask.to(device),
            state=functional.pad(state, (0, self.d_state - state.shape[-1])).to(device),
            cameras=cameras,
        )
        return inputs, raw

    def with_key(self, unnorm_key: str) -> "Processor":
        """The same processor with one of several sets of statistics, for checkpoints that have several.

        Raises ValueError for all others.
        """
        raise ValueError(f"unnorm_key={unnorm_key!r}: this checkpoint has one set of statistics; leave the key out")

    def actions(self, padded: Float[Tensor, "batch step d_padded"], raw: bool) -> tuple[Tensor, Tensor]:
        """The real dimensions, in the robot's units (or normalised, for a batch that came preprocessed), and
        normalised."""
        normalized = padded[..., : self.features.d_action]
        return (self.normalizer.inverse(lerobot.ACTION, normalized) if raw else normalized), normalized

    def _renamed(self, key: str) -> str:
        """A raw batch's key as this checkpoint knows it; a camera's mask goes with its images."""
        images = key.removesuffix(lerobot.MASK_SUFFIX)
        return self.features.rename.get(images, images) + key[len(images) :]

    def _state(self, obs: Mapping[str, Any]) -> Float[Tensor, "batch d_state"]:
        state = _tensor(obs, lerobot.OBS_STATE)
        if not state.is_floating_point():
            raise TypeError(f"{lerobot.OBS_STATE} must be floating point, got {state.dtype}")
        state = state[:, -1] if state.ndim == 3 else state
        if state.ndim != 2 or state.shape[-1] not in (self.features.d_state, self.d_state):
            raise ValueError(f"{lerobot.OBS_STATE} must be [batch, {self.features.d_state}], got {list(state.shape)}")
        if state.shape[0] == 0:
            raise ValueError("empty batch: the observation has 0 rows")
        if not state.isfinite().all():
            raise ValueError(f"{lerobot.OBS_STATE} has NaN or infinite values")
        return state.float()

    def _text(self, obs: Mapping[str, Any], batch: int) -> tuple[Tensor, Tensor]:
        if lerobot.OBS_TOKENS not in obs:
            return self.tokenizer(read_instructions(obs, batch))
        tokens = _tensor(obs, lerobot.OBS_TOKENS)
        mask = _tensor(obs, lerobot.OBS_TOKEN_MASK).bool()
        if tokens.is_floating_point() or tokens.shape != mask.shape or tokens.ndim != 2 or len(tokens) != batch:
            raise ValueError(
                f"{lerobot.OBS_TOKENS} must be integers [{batch}, text] with a mask of the same shape; got "
                f"{tokens.dtype} {list(tokens.shape)} and mask {list(mask.shape)}"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.d_vocab:
            raise ValueError(f"{lerobot.OBS_TOKENS} must be ids in 0..{self.d_vocab - 1}")
        return tokens.long(), mask

    def _cameras(self, obs: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The cameras that the observation shows, and those that it does not.

        Raises KeyError when more are missing than may be.
        """
        present = [camera for camera in self.features.cameras if lerobot.image_key(camera) in obs]
        absent = [camera for camera in self.features.cameras if camera not in present]
        missing = [camera for camera in absent if not lerobot.is_empty_camera(camera)]
        if not present or len(missing) > self.features.empty_cameras:
            raise KeyError(
                f"missing cameras {missing}: expected {[lerobot.image_key(c) for c in missing]} in the observation, "
                f"which has {sorted(key for key in obs if 'image' in key)}"
            )
        return present, absent

    def _seen(self, obs: Mapping[str, Any], camera: str, batch: int) -> Bool[Tensor, " batch"]:
        """In which rows a camera's image is real."""
        mask = torch.as_tensor(obs.get(lerobot.image_mask_key(camera), [True] * batch)).bool().cpu()
        if mask.shape != (batch,):
            raise ValueError(f"camera {camera!r}: its mask must be [{batch}], got {list(mask.shape)}")
        return mask

    def _images(self, obs: Mapping[str, Any], batch: int, raw: bool) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        present, absent = self._cameras(obs)
        images, seen = {}, {}
        for camera in present:
            key = lerobot.image_key(camera)
            # past the checkpoint's preprocessor, images that it normalises have left 0..1
            in_range = raw or self.normalizer.modes[key] == "IDENTITY"
            image = check_image(camera, _tensor(obs, key), batch, in_range)
            image = self.normalizer(key, image) if raw else image
            if self.features.resize is not None:
                image = self.resize(image, *self.features.resize)
            images[camera] = image * 2 - 1
            seen[camera] = self._seen(obs, camera, batch)
        sizes = {camera: tuple(image.shape[-2:]) for camera, image in images.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"without resizing, all cameras need one image size; got {sizes}")
        # cameras that the robot lacks: blank images that no token attends to, so many as empty_cameras says
        blank = absent[: self.features.empty_cameras]
        for camera in blank:
            images[camera] = torch.full_like(images[present[0]], -1.0)
            seen[camera] = torch.zeros(batch, dtype=torch.bool)
        order = (*present, *blank)
        return torch.stack([images[c] for c in order], dim=1), torch.stack([seen[c] for c in order], dim=1), order


def check_image(camera: str, image: Tensor, batch: int, in_range: bool) -> Float[Tensor, "batch 3 height width"]:
    """A camera's images as float32; in_range: they must be in 0..1.

    Raises TypeError or ValueError naming the camera and what was expected.
    """
    image = image[:, -1] if image.ndim == 5 else image
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[0] != batch or not image.numel():
        raise ValueError(f"camera {camera!r}: images must be [{batch}, 3, height, width], got {list(image.shape)}")
    if not image.is_floating_point():
        raise TypeError(f"camera {camera!r}: images [B 3 H W] must be floats in 0..1, got {image.dtype}")
    if not image.isfinite().all():
        raise ValueError(f"camera {camera!r}: images have NaN or infinite values")
    low, high = image.aminmax()
    if in_range and (low < -_ROUNDING or high > 1 + _ROUNDING):
        raise ValueError(f"camera {camera!r}: images must be in 0..1, got {float(low):g}..{float(high):g}")
    return image.float()


def _tensor(obs: Mapping[str, Any], key: str) -> Tensor:
    if key not in obs:
        raise KeyError(f"the observation has no {key!r}; it has {sorted(obs)}")
    return torch.as_tensor(obs[key])


def read_instructions(obs: Mapping[str, Any], batch: int) -> list[str]:
    """The instruction of every row.

    Raises KeyError where there is none, ValueError for anything but a string or one string a row.
    """
    if lerobot.TASK not in obs:
        raise KeyError(f"the observation has neither {lerobot.TASK!r} nor {lerobot.OBS_TOKENS!r}; it has {sorted(obs)}")
    task = obs[lerobot.TASK]
    listed = list(task) if isinstance(task, Sequence) and not isinstance(task, str) else [task] * batch
    instructions = [text for text in listed if isinstance(text, str)]
    if len(instructions) != batch or len(listed) != batch:
        raise ValueError(f"{lerobot.TASK!r} must be a string or {batch} strings, got {task!r}")
    return instructions


def observation_batch(obs: Observation) -> dict[str, Any]:
    """An Observation in LeRobot's keys, batched, with byte images scaled to 0..1 and channels first."""
    state = torch.as_tensor(np.asarray(obs.state) if not isinstance(obs.state, Tensor) else obs.state)
    state = state[None] if state.ndim == 1 else state
    batch: dict[str, Any] = {lerobot.TASK: obs.instruction, lerobot.OBS_STATE: state}
    unknown = sorted(set(obs.image_masks or {}) - set(obs.images))
    if unknown:
        raise KeyError(f"image_masks for cameras {unknown} that have no images; cameras: {sorted(obs.images)}")
    for camera, value in obs.images.items():
        if value is None:
            raise ValueError(f"camera {camera!r}: its image is None; leave out a camera that is not there")
        image = value if isinstance(value, Tensor) else torch.as_tensor(np.ascontiguousarray(value))
        image = image[None] if image.ndim == 3 else image
        if image.dtype == torch.uint8:
            if image.ndim != 4 or image.shape[-1] != 3:
                shape = list(image.shape)
                raise ValueError(f"camera {camera!r}: uint8 images must be [H W 3] or [B H W 3], got {shape}")
            image = image.permute(0, 3, 1, 2) / 255
        batch[lerobot.image_key(camera)] = image
    for camera, mask in (obs.image_masks or {}).items():
        batch[lerobot.image_mask_key(camera)] = mask
    return batch
