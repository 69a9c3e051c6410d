"""The recorded public checkpoints, and raw observations."""

from dataclasses import dataclass
from pathlib import Path

import torch
from recipe import checkpoint_folder
from safetensors.torch import load_file
from torch import Tensor

from hooked_vla import Observation

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """A tiny checkpoint in its public layout, its batch, and what the public implementation made of it."""

    folder: Path
    batch: dict[str, Tensor]
    noise: Tensor | list[Tensor]
    recorded: dict[str, Tensor]

    @property
    def actions(self) -> Tensor:
        return self.recorded["output.actions"]


def read_golden(name: str) -> Golden:
    recorded = load_file(GOLDEN / name / "golden.safetensors")
    batch = {key.removeprefix("input."): value for key, value in recorded.items() if key.startswith("input.")}
    # the starting noise alone, or every draw in order, of which there may be none
    draws = [batch.pop(f"draw.{i}") for i in range(sum(key.startswith("draw.") for key in batch))]
    return Golden(checkpoint_folder(GOLDEN / name), batch, batch.pop("noise", draws), recorded)


def make_observation(batch: int = 2, seed: int = 0, instruction: list[str] | None = None) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    images = {
        camera: torch.randint(0, 256, (batch, 48, 80, 3), generator=generator, dtype=torch.uint8)
        for camera in ("agent", "wrist")
    }
    texts = instruction or ["put the red block on the tray", "lift"][:batch] + ["push"] * (batch - 2)
    return Observation(images, torch.randn(batch, 4, generator=generator), texts)
