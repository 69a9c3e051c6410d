"""GR00T's inputs: what its public processors make (Eagle's for N1.5, Qwen3-VL's for N1.7), or raw observations.

A batch with token ids is past the public preprocessor: its actions come back normalised, at the padded width unless
config.json states the robot's.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from hooked_vla import lerobot
from hooked_vla.inputs import EmbodiedInputs, ModelInputs, Observation
from hooked_vla.policy import Processor, Tokenizer, check_image, observation_batch, read_instructions
from hooked_vla.processors.groot_robot import Robot, read_robot
from hooked_vla.processors.resize import area_shortest_edge, bicubic, center_crop, letterbox, whole_tokens
from hooked_vla.spec import ChatSpec, FeatureVLASpec, PatchVisionSpec

logger = logging.getLogger(__name__)

STATE = "state"
EMBODIMENT = "embodiment_id"
IMAGE_GRID = "image_grid_thw"
# what the policy is told where there is no instruction; LeRobot: processor_groot.py
NO_INSTRUCTION = "Perform the task."


class GrootProcessor(Processor):
    """A batch of the public entry point, or an observation, to EmbodiedInputs."""

    def __init__(self, spec: FeatureVLASpec, tokenizer: Tokenizer, robot: Robot) -> None:
        assert spec.vlm.d_vocab is not None
        super().__init__(tokenizer.features, robot.normalizer, tokenizer, spec.flow.d_state, spec.vlm.d_vocab)
        self.spec, self.robot = spec, robot
        eagle = not isinstance(spec.vision, PatchVisionSpec)
        names = ("input_ids", "attention_mask", "pixel_values")
        self.tokens, self.mask, self.pixels = (f"eagle_{name}" if eagle else name for name in names)

    @classmethod
    def from_files(
        cls,
        spec: FeatureVLASpec,
        folder: Path | None,
        files: Mapping[str, bytes],
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> "GrootProcessor":
        robot = read_robot(spec, files)
        features = spec.features if robot.cameras is None else replace(spec.features, cameras=robot.cameras)
        if folder is not None and not robot.normalizer.statistics:
            logger.warning("no statistics of state and action in the checkpoint: their values pass unchanged")
        return cls(spec, Tokenizer(features, folder, spec.vlm.d_vocab or 0), robot)

    def __call__(
        self, obs: Observation | Mapping[str, Any] | ModelInputs, device: torch.device
    ) -> tuple[ModelInputs, bool]:
        if isinstance(obs, ModelInputs):
            return obs, False
        batch = observation_batch(obs) if isinstance(obs, Observation) else dict(obs)
        raw = self.tokens not in batch
        cameras = self._cameras(batch)
        if raw:
            batch = self._preprocess(batch, cameras, exact=isinstance(obs, Observation))
        tokens, mask = self._tokens(batch)
        images, grid = self._pictures(batch, tokens, mask)
        inputs = EmbodiedInputs(
            images=images.to(device),
            tokens=tokens.to(device),
            token_mask=mask.to(device),
            state=self._states(batch, len(tokens)).to(device),
            embodiment=self._embodiments(batch, len(tokens)).to(device),
            cameras=cameras if len(cameras) == images.shape[1] else tuple(str(i) for i in range(images.shape[1])),
            grid=grid,
        )
        return inputs, raw

    def actions(self, padded: Float[Tensor, "batch step d_padded"], raw: bool) -> tuple[Tensor, Tensor]:
        """The robot's dimensions; for raw observations also its steps only, and un-normalised."""
        if not raw:
            normalized = padded[..., : self.features.d_action]
            return normalized, normalized
        width = self.robot.width(lerobot.ACTION) or self.features.d_action
        normalized = padded[:, : self.robot.n_steps, :width]
        return self.robot.decode(normalized), normalized

    def _cameras(self, batch: Mapping[str, Any]) -> tuple[str, ...]:
        """The checkpoint's cameras; where it names none, the batch's in alphabetical order, as LeRobot takes them."""
        present = sorted(lerobot.camera_name(key) for key in batch if key.startswith(lerobot.IMAGES))
        cameras = self.features.cameras or tuple(present)
        if not cameras and self.tokens not in batch:
            raise KeyError(f"the observation has no images; it has {sorted(batch)}")
        return cameras

    # Batches of the public entry point.

    def _tokens(self, batch: Mapping[str, Any]) -> tuple[Int[Tensor, "batch text"], Bool[Tensor, "batch text"]]:
        tokens, mask = _entry(batch, self.tokens), _entry(batch, self.mask)
        if tokens.is_floating_point() or tokens.ndim != 2 or tokens.shape != mask.shape or not len(tokens):
            raise ValueError(
                f"{self.tokens!r} must be integers [batch, text] with a mask of the same shape; got "
                f"{tokens.dtype} {list(tokens.shape)} and {self.mask!r} {list(mask.shape)}"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.d_vocab:
            raise ValueError(f"{self.tokens!r} must be ids in 0..{self.d_vocab - 1}")
        return tokens.long(), mask.bool()

    def _pictures(
        self, batch: Mapping[str, Any], tokens: Int[Tensor, "batch text"], mask: Bool[Tensor, "batch text"]
    ) -> tuple[Float[Tensor, "batch camera ..."], tuple[int, int]]:
        """Images by row and camera, and their grid of patches."""
        pixels, n_rows = _entry(batch, self.pixels), len(tokens)
        if not pixels.is_floating_point() or not pixels.isfinite().all():
            raise ValueError(f"{self.pixels!r} must be finite floating-point numbers")
        vision = self.spec.vision
        if isinstance(vision, PatchVisionSpec):
            grid, d_patch = self._grid(batch), 3 * vision.frames * vision.patch_size**2
            n_patches, n_tokens = grid[0] * grid[1], grid[0] * grid[1] // vision.merge**2
            if pixels.ndim != 2 or pixels.shape[1] != d_patch or len(pixels) % (n_rows * n_patches):
                raise ValueError(
                    f"{self.pixels!r} must be [patch, {d_patch}] with {n_patches} patches an image and as many images "
                    f"in each of {n_rows} rows; got {list(pixels.shape)}"
                )
            images = rearrange(pixels, "(b n s) d -> b n s d", b=n_rows, s=n_patches)
        else:
            side = vision.image_size
            if pixels.ndim != 4 or pixels.shape[1:] != (3, side, side) or len(pixels) % n_rows:
                raise ValueError(
                    f"{self.pixels!r} must be [image, 3, {side}, {side}] with as many images in each of {n_rows} rows; "
                    f"got {list(pixels.shape)}"
                )
            grid = (side // vision.patch_size, side // vision.patch_size)
            n_tokens = grid[0] * grid[1]
            images = rearrange(pixels, "(b n) ... -> b n ...", b=n_rows)
        places = ((tokens == self.spec.image_token) & mask).sum(1)
        if images.shape[1] == 0 or not (places == images.shape[1] * n_tokens).all():
            raise ValueError(
                f"{self.tokens!r} has {places.tolist()} places for image tokens (id {self.spec.image_token}), but "
                f"{images.shape[1]} images of {n_tokens} tokens in each row"
            )
        return images.float(), grid

    def _grid(self, batch: Mapping[str, Any]) -> tuple[int, int]:
        grids = _entry(batch, IMAGE_GRID).tolist()
        if not grids or any(each != grids[0] for each in grids) or grids[0][0] != 1:
            raise ValueError(f"{IMAGE_GRID!r} must be [1, rows, columns], the same for every image; got {grids}")
        return grids[0][1], grids[0][2]

    def _states(self, batch: Mapping[str, Any], n_rows: int) -> Float[Tensor, "batch d_state"]:
        state, flow = _entry(batch, STATE), self.spec.flow
        shape = (n_rows, flow.n_state_steps, flow.d_state)
        if state.shape != shape or not state.is_floating_point():
            raise ValueError(f"{STATE!r} must be floats {list(shape)}, got {state.dtype} {list(state.shape)}")
        if not state.isfinite().all():
            raise ValueError(f"{STATE!r} has NaN or infinite values")
        return rearrange(state.float(), "b t d -> b (t d)")

    def _embodiments(self, batch: Mapping[str, Any], n_rows: int) -> Int[Tensor, " batch"]:
        ids = _entry(batch, EMBODIMENT)
        n = self.spec.flow.n_embodiments
        if ids.shape != (n_rows,) or ids.is_floating_point() or not 0 <= int(ids.min()) <= int(ids.max()) < n:
            raise ValueError(f"{EMBODIMENT!r} must be {n_rows} integers in 0..{n - 1}, got {ids}")
        return ids.long()

    # Raw observations, as the public preprocessors treat them.

    def _preprocess(self, batch: Mapping[str, Any], cameras: tuple[str, ...], exact: bool) -> dict[str, Any]:
        """The public entry point's batch. exact: float images are bytes over 255, to be rounded and not cut off."""
        if self.robot.unsupported:
            raise ValueError(f"{self.robot.unsupported}; pass a batch of the public preprocessor and decode its output")
        state, flow = self._state(batch), self.spec.flow
        if flow.n_state_steps != 1:
            raise ValueError(f"the model reads {flow.n_state_steps} states at once: pass a preprocessed batch")
        n_rows = len(state)
        pictures = torch.stack([self._picture(batch, camera, n_rows, exact) for camera in cameras], dim=1)
        pixels = (pictures.float() / 255 - 0.5) / 0.5
        vision = self.spec.vision
        rows, columns = (side // vision.patch_size for side in pixels.shape[-2:])
        n_tokens = rows * columns
        if isinstance(vision, PatchVisionSpec):
            n_tokens //= vision.merge**2
            pixels = patches(pixels, vision)
        tokens, mask = self._chat(read_instructions(batch, n_rows), len(cameras), n_tokens)
        state = self.normalizer(lerobot.OBS_STATE, state)
        return {
            self.tokens: tokens,
            self.mask: mask,
            self.pixels: rearrange(pixels, "b n ... -> (b n) ...").flatten(0, -4 if pixels.ndim == 5 else -2),
            IMAGE_GRID: torch.tensor([[1, rows, columns]]).expand(n_rows * len(cameras), -1),
            STATE: functional.pad(state, (0, flow.d_state - state.shape[-1]))[:, None],
            EMBODIMENT: batch.get(EMBODIMENT, torch.full((n_rows,), self.robot.embodiment)),
        }

    def _state(self, batch: Mapping[str, Any]) -> Float[Tensor, "batch d_state"]:
        state = _entry(batch, lerobot.OBS_STATE)
        # without statistics, NVIDIA's files do not say how wide the robot's state is
        width = self.robot.width(lerobot.OBS_STATE) or self.features.d_state
        fits = state.ndim == 2 and (state.shape[1] == width or width == self.d_state > state.shape[1])
        if not fits or not len(state) or not state.is_floating_point():
            raise ValueError(
                f"{lerobot.OBS_STATE} must be floats [batch, {width}], got {state.dtype} {list(state.shape)}"
            )
        if not state.isfinite().all():
            raise ValueError(f"{lerobot.OBS_STATE} has NaN or infinite values")
        return state.float()

    def _picture(
        self, batch: Mapping[str, Any], camera: str, n_rows: int, exact: bool
    ) -> UInt8[Tensor, "batch 3 height width"]:
        key = lerobot.image_key(camera)
        if key not in batch:
            raise KeyError(f"missing camera {camera!r}: expected {key!r}, the observation has {sorted(batch)}")
        # resizing bytes is a matter for the CPU
        image = torch.as_tensor(batch[key]).cpu()
        if image.dtype != torch.uint8:
            image = check_image(camera, image, n_rows, in_range=True).clamp(0, 1) * 255
            image = (image.round() if exact else image).to(torch.uint8)
        rule, chat = self.robot.images, self.spec.chat
        image = letterbox(image) if rule.letterbox else image
        if rule.area:
            image = area_shortest_edge(image, rule.edge)
            image = area_shortest_edge(center_crop(image, rule.crop, floor=True), rule.edge)
        else:
            image = bicubic(image, (rule.edge, rule.edge))
            image = bicubic(center_crop(image, rule.crop, floor=False), rule.target)
        vision = self.spec.vision
        if chat.pixels is not None and isinstance(vision, PatchVisionSpec):
            image = bicubic(image, whole_tokens(image.shape[-2:], vision.patch_size * vision.merge, chat.pixels))
        return image

    def _chat(self, instructions: Sequence[str], n_cameras: int, n_tokens: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask of the conversation, padded on the left.

        The model reads padding too: only where it is always padded to `max_text` do rows not depend on each other.
        """
        tokenizer = self.tokenizer.load()
        rows = []
        for instruction in instructions:
            ids: list[int] = []
            for text in conversation(self.spec.chat, self.robot.formal, instruction, n_cameras):
                ids += [self.spec.image_token] * n_tokens if text is None else _ids(tokenizer, text)
            rows.append(ids)
        longest = max(len(ids) for ids in rows)
        if longest > self.features.max_text:
            raise ValueError(f"prompt of {longest} tokens, but the model takes {self.features.max_text}")
        length = self.features.max_text if self.features.pad_text == "max_length" else longest
        tokens = torch.full((len(rows), length), tokenizer.pad_token_id or 0, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(rows):
            tokens[row, length - len(ids) :] = torch.tensor(ids)
            mask[row, length - len(ids) :] = 1
        return tokens, mask


def conversation(chat: ChatSpec, formal: bool, instruction: str, n_cameras: int) -> list[str | None]:
    """The pieces of the prompt; None stands for an image's tokens."""
    text = instruction or NO_INSTRUCTION
    if formal:
        text = "".join(c for c in text.lower() if c.isalnum() or c.isspace() or c == "_")
    pieces: list[str | None] = []
    before = chat.start
    for number in range(1, n_cameras + 1):
        pieces += [before + chat.image_start.format(number), None]
        before = chat.image_end
    return [*pieces, before + (str([text]) if chat.listed else text) + chat.end]


def patches(
    images: Float[Tensor, "batch camera 3 height width"], vision: PatchVisionSpec
) -> Float[Tensor, "batch camera patch d_patch"]:
    """Patches in merge order, every image repeated as the patches' frames."""
    frames = repeat(images, "b n c h w -> b n c f h w", f=vision.frames)
    return rearrange(
        frames, "b n c f (h dh p) (w dw q) -> b n (h w dh dw) (c f p q)",
        dh=vision.merge, dw=vision.merge, p=vision.patch_size, q=vision.patch_size,
    )  # fmt: skip


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _entry(batch: Mapping[str, Any], key: str) -> Tensor:
    if key not in batch:
        raise KeyError(f"the batch has no {key!r}; it has {sorted(batch)}")
    return torch.as_tensor(batch[key])


PROCESSOR = GrootProcessor
