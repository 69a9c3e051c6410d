"""Common random numbers: what a policy draws follows from the episode's seed and the environment step alone.

So all arms of a sweep act from the same noise, and an episode draws the same numbers whatever shares its batch.
Which draws a model needs is found out by running it once; nothing here knows a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_vla.inputs import Draws
from hooked_vla.vla import HookedVLA


@dataclass(frozen=True)
class Draw:
    """One draw of a forward pass. kind: the method of Draws; shape: of one batch row's part.

    parameter: the method's own number (options of `integers`, alpha of `beta`), else 0.
    """

    kind: str
    shape: tuple[int, ...]
    parameter: float = 0.0

    def take(self, generator: torch.Generator) -> Tensor:
        """This draw for one row, on the CPU."""
        if self.kind == "normal":
            return torch.randn(self.shape, generator=generator)
        if self.kind == "choice":
            return torch.empty(self.shape).exponential_(generator=generator)
        if self.kind == "integers":
            return torch.randint(int(self.parameter), self.shape, generator=generator)
        uniform = torch.rand(self.shape, generator=generator)
        return uniform ** (1 / self.parameter) if self.kind == "beta" else uniform


class _Recorder(Draws):
    """Draws afresh for a batch of one row, and notes what was asked for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(None, device)
        self.asked: list[Draw] = []

    def normal(self, shape: Sequence[int]) -> Tensor:
        self._note("normal", shape)
        return super().normal(shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        self._note("uniform", shape)
        return super().uniform(shape)

    def beta(self, alpha: float, shape: Sequence[int]) -> Tensor:
        self._note("beta", shape, float(alpha))
        return super().beta(alpha, shape)

    def integers(self, n: int, shape: Sequence[int]) -> Int[Tensor, "*shape"]:
        self._note("integers", shape, float(n))
        return super().integers(n, shape)

    def choice(self, weights: Float[Tensor, "row option"]) -> Int[Tensor, "row 1"]:
        # one batch row may choose several times: all rows of the weights are its own
        self.asked.append(Draw("choice", tuple(weights.shape)))
        return super().choice(weights)

    def _note(self, kind: str, shape: Sequence[int], parameter: float = 0.0) -> None:
        if not shape or shape[0] != 1:
            raise ValueError(f"the model draws {kind} numbers of shape {list(shape)} for a batch of one row")
        self.asked.append(Draw(kind, tuple(shape[1:]), parameter))


class SeededNoise:
    """The `noise` of a model for rows that have seeds of their own: `noise(seeds, env_step)`.

    draws: what one batch row draws in a forward pass, in order; none for a model that draws nothing.
    """

    def __init__(self, draws: Sequence[Draw]) -> None:
        self.draws = tuple(draws)

    @classmethod
    def of(cls, model: HookedVLA, obs: Any) -> "SeededNoise":
        """Finds out what the model draws, by running it on an observation (or batch, or inputs) of one row.

        Raises ValueError for several rows, or a model that draws numbers which belong to no row.
        """
        inputs = model.prepare(obs)
        if inputs.batch_size != 1:
            raise ValueError(f"the draws are found on a batch of one row, got {inputs.batch_size}")
        recorder = _Recorder(model.device)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), model.running(inputs):
            model.net.sample_actions(inputs, recorder, model.run_state)
        return cls(recorder.asked)

    def __call__(self, seeds: Sequence[int], env_step: int) -> list[Tensor]:
        """Every draw of a forward pass on len(seeds) rows, in order, as `predict_action_chunk` takes it; on the CPU.

        Row i's numbers depend on seeds[i] and env_step (0 or more) only.
        """
        generators = [_generator(seed, env_step) for seed in seeds]
        rows = [[draw.take(generator) for draw in self.draws] for generator in generators]
        return [
            torch.cat(parts) if draw.kind == "choice" else torch.stack(parts)
            for draw, parts in zip(self.draws, zip(*rows, strict=True), strict=True)
        ]


def _generator(seed: int, env_step: int) -> torch.Generator:
    state = np.random.SeedSequence((seed, env_step)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))
