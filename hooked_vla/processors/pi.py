"""π0 and π0.5: prompts that may tell the state, centred padding, and blank images for cameras that are not there."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from hooked_vla import lerobot
from hooked_vla.policy import Processor, read_instructions

# openpi, PaligemmaTokenizer.tokenize: the normalised state in bins of -1..1
N_BINS = 256


class PiProcessor(Processor):
    """As LeRobot's pi0 and pi05: any cameras but one may be missing; template: of the prompt, as in the spec."""

    template: str

    @classmethod
    def from_files(
        cls,
        spec: Any,
        folder: Path | None,
        files: Mapping[str, bytes],
        statistics: Mapping[str, Mapping[str, Tensor]],
    ) -> "PiProcessor":
        processor = super().from_files(spec, folder, files, statistics)
        assert isinstance(processor, PiProcessor)
        processor.template = spec.template
        processor.features = replace(processor.features, empty_cameras=len(processor.features.cameras))
        return processor

    def prompts(self, instructions: list[str], state: Float[Tensor, "batch d_state"]) -> list[str]:
        """What the model reads of each row's instruction and normalised state."""
        if "{state}" not in self.template:
            return [self.template.format(task=text.removesuffix("\n")) for text in instructions]
        edges = torch.linspace(-1, 1, N_BINS + 1, dtype=torch.float64)[:-1]
        # a state below -1 is in bin -1, as in the source
        bins = torch.bucketize(state.double().cpu(), edges, right=True) - 1
        tasks = [text.strip().replace("_", " ").replace("\n", " ") for text in instructions]
        told = [" ".join(map(str, row)) for row in bins.tolist()]
        return [self.template.format(task=task, state=each) for task, each in zip(tasks, told, strict=True)]

    def _text(self, obs: Mapping[str, Any], batch: int) -> tuple[Tensor, Tensor]:
        if lerobot.OBS_TOKENS in obs:
            return super()._text(obs, batch)
        state = self.normalizer(lerobot.OBS_STATE, self._state(obs))
        return self.tokenizer.encode(self.prompts(read_instructions(obs, batch), state))

    @staticmethod
    def resize(
        images: Float[Tensor, "batch 3 height width"], width: int, height: int
    ) -> Float[Tensor, "batch 3 new_height new_width"]:
        """Scale to fit, keeping the aspect, and pad with 0 on both sides (LeRobot: vla_utils.resize_with_pad_torch)."""
        old_height, old_width = images.shape[-2:]
        if (old_height, old_width) == (height, width):
            return images
        ratio = max(old_width / width, old_height / height)
        size = (int(old_height / ratio), int(old_width / ratio))
        fitted = functional.interpolate(images, size=size, mode="bilinear", align_corners=False).clamp(0, 1)
        top, left = (height - size[0]) // 2, (width - size[1]) // 2
        return functional.pad(fitted, (left, width - size[1] - left, top, height - size[0] - top))


PROCESSOR = PiProcessor
