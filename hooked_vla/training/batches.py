"""From recorded moments to batches: prompts drawn, the model's own processor applied and the frozen tower run, once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from tqdm import trange

from hooked_vla import lerobot
from hooked_vla.hooks.cache_file import write_safetensors
from hooked_vla.inputs import ModelInputs, Observation
from hooked_vla.rollouts.tabletop.tasks import find_task
from hooked_vla.training.dataset import Moments
from hooked_vla.training.language import prompt_variants
from hooked_vla.vla import HookedVLA

_AT_ONCE = 128


@dataclass(frozen=True)
class Prompting:
    """Shares of the training prompts that are said in other words, or left empty."""

    paraphrased: float = 0.5
    dropped: float = 0.04


@dataclass(frozen=True)
class Batch:
    """inputs with the tower's features, normalised target actions, and goals as in demonstrations.Moment."""

    inputs: ModelInputs
    actions: Float[Tensor, "batch step d_action"]
    goals: Float[Tensor, "batch 2 2"]

    def __len__(self) -> int:
        return len(self.actions)

    def rows(self, rows: Sequence[int]) -> "Batch":
        """Some rows of it."""
        return Batch(self.inputs.rows(rows), self.actions[rows], self.goals[rows])


@torch.no_grad()
def encode(model: HookedVLA, moments: Moments, prompting: Prompting, seed: int, kept: Path | None = None) -> Batch:
    """All moments as one batch without images; the features of the tower are kept in half precision.

    kept: a file for the result, which is read instead where it is there already: running the tower takes minutes.
    """
    rng = np.random.default_rng(seed)
    variants = [
        prompt_variants(find_task(suite, task).instruction, 64, rng, prompting.paraphrased, prompting.dropped)
        for suite, task in moments.tasks
    ]
    prompts = [variants[task][rng.integers(64)] for task in moments.task]
    cameras = model.spec.features.cameras

    def prepare(rows: slice) -> ModelInputs:
        images = {camera: moments.images[rows, i] for i, camera in enumerate(cameras)}
        return model.prepare(Observation(images, moments.state[rows], prompts[rows]))

    if kept is not None and kept.exists():
        return _read(kept, prepare(slice(0, 1)))
    parts = []
    for start in trange(0, len(moments), _AT_ONCE, mininterval=10, desc="vision features", unit="batch"):
        inputs = prepare(slice(start, start + _AT_ONCE))
        parts.append(replace(inputs, features=model.net.vision_features(inputs).half(), images=None))
    actions = model.processor.normalizer(lerobot.ACTION, torch.from_numpy(moments.chunk))
    batch = Batch(concatenate(parts), actions, torch.from_numpy(moments.goal))
    if kept is not None:
        _write(kept, batch)
    return batch


def _write(path: Path, batch: Batch) -> None:
    """The batch's tensors; the file appears when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"inputs.{name}": value for name, value in vars(batch.inputs).items() if isinstance(value, Tensor)}
    tensors |= {"actions": batch.actions, "goals": batch.goals}
    write_safetensors(path, [(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()], {})


def _read(path: Path, like: ModelInputs) -> Batch:
    """like: inputs of the same model, for what is the same in all rows."""
    tensors = load_file(path)
    inputs = {name.removeprefix("inputs."): value for name, value in tensors.items() if name.startswith("inputs.")}
    return Batch(replace(like, images=None, **inputs), tensors["actions"], tensors["goals"])


def concatenate(parts: Sequence[ModelInputs]) -> ModelInputs:
    """Inputs one after the other.

    Raises ValueError when they differ in what is not a row, such as the length of the text.
    """
    first, joined = parts[0], {}
    for name in (each.name for each in fields(first)):
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], Tensor):
            if len({value.shape[1:] for value in values}) > 1:
                raise ValueError(f"{name} has shapes {sorted({tuple(value.shape[1:]) for value in values})} by row")
            joined[name] = torch.cat(values)
    return replace(first, **joined)


def shuffled(batch: Batch, size: int, seed: int, skip: int = 0) -> Iterator[Batch]:
    """Endless batches of `size` rows; every row comes once before any comes again.

    skip: so many batches are left out at the start.
    """
    rng, n_left_out = np.random.default_rng(seed), 0
    while True:
        order = rng.permutation(len(batch))
        for start in range(0, len(order) - size + 1, size):
            if n_left_out < skip:
                n_left_out += 1
                continue
            yield batch.rows(order[start : start + size].tolist())
