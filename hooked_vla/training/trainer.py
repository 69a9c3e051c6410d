"""The training loop: accelerate inside, an average of the weights beside, resumable, with a CSV log.

The vision tower is frozen, as these models freeze theirs; everything else is trained from random weights.
"""

import csv
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from hooked_vla.folders import write_file
from hooked_vla.training.batches import Batch, shuffled
from hooked_vla.training.objective import Objective, Readout
from hooked_vla.vla import HookedVLA

# decay of the averaged weights, once training has been going for a while
AVERAGING = 0.999
_LOG_EVERY = 50


@dataclass(frozen=True)
class Schedule:
    """steps, each on `batch` moments with `n_draws` draws of noise; the learning rate rises to `rate` and falls along a
    cosine to a hundredth of it."""

    steps: int
    batch: int = 128
    n_draws: int = 4
    rate: float = 1e-3
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at a step."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def train(
    model: HookedVLA,
    data: Batch,
    schedule: Schedule,
    readout: Readout | None,
    folder: Path,
    seed: int,
    save_every: int = 500,
    evaluate: tuple[int, Callable[[HookedVLA], dict[str, float]]] | None = None,
) -> None:
    """Train in place; at the end the model holds the averaged weights.

    folder: log.csv (step, loss, error of the read-out, learning rate) and the state to resume from; a run that finds a
    state there goes on from it. evaluate: how often, and a function whose numbers go into curve.csv.
    """
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    objective = Objective(model, schedule.n_draws, readout)
    model.net.get_submodule("vision").requires_grad_(False)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, schedule.rate, betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step))
    average = Average(model.net)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    # saved and loaded with the accelerator's own state
    accelerator.register_for_checkpointing(rates, average)
    progress = Progress(folder, accelerator, rates)
    done = progress.resume()
    batches = shuffled(data, schedule.batch, seed, skip=done)
    with tqdm(total=schedule.steps, initial=done, desc="training", unit="step") as bar:
        for step in range(done, schedule.steps):
            batch = next(batches)
            total, loss, error = objective(batch.inputs, batch.actions, batch.goals)
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(total)
            accelerator.clip_grad_norm_(trained, schedule.clip)
            optimizer.step()
            rates.step()
            average.update(model.net, step)
            progress.note(step, float(loss), float(error))
            bar.update()
            if (step + 1) % _LOG_EVERY == 0:
                bar.set_postfix(loss=f"{progress.loss:.4f}", goal=f"{progress.error:.4f}")
            if (step + 1) % save_every == 0 or step + 1 == schedule.steps:
                progress.save(step + 1)
            if evaluate is not None and (step + 1) % evaluate[0] == 0:
                with average.in_place(model.net):
                    progress.curve(step + 1, evaluate[1](model))
    average.give(model.net)


class Average:
    """An exponential moving average of a network's trained weights."""

    def __init__(self, net: nn.Module) -> None:
        self.weights = {name: each.detach().clone() for name, each in net.named_parameters() if each.requires_grad}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Move towards the weights as they are now; quickly while training is young."""
        decay = min(AVERAGING, (1 + step) / (10 + step))
        now = dict(net.named_parameters())
        for name, value in self.weights.items():
            value.lerp_(now[name], 1 - decay)

    @torch.no_grad()
    def give(self, net: nn.Module) -> None:
        """Put the average into the network."""
        parameters = dict(net.named_parameters())
        for name, value in self.weights.items():
            parameters[name].copy_(value)

    @contextmanager
    def in_place(self, net: nn.Module) -> Iterator[None]:
        """For the block, the network holds the average."""
        parameters = dict(net.named_parameters())
        before = {name: parameters[name].detach().clone() for name in self.weights}
        self.give(net)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    parameters[name].copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return dict(self.weights)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from saved averages."""
        self.weights = {name: value.clone() for name, value in state.items()}


class Progress:
    """What a run leaves in its folder: log.csv, curve.csv and the state from which it can go on."""

    def __init__(self, folder: Path, accelerator: Accelerator, rates: LRScheduler) -> None:
        self.folder, self.accelerator, self.rates = folder, accelerator, rates
        self.loss = self.error = math.nan
        self._rows: list[tuple[int, float, float, float]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> int:
        """Take up the saved state, if there is one; the number of steps that it has seen."""
        states = sorted(self.folder.glob("state-*"), key=lambda path: int(path.name.split("-")[1]))
        if not states:
            return 0
        step = int(states[-1].name.split("-")[1])
        self.accelerator.load_state(str(states[-1]))
        self._forget_after(step)
        return step

    def note(self, step: int, loss: float, error: float) -> None:
        """Remember a step; rows go to log.csv with the next state."""
        keep = 0.98 if step else 0.0
        self.loss = loss if math.isnan(self.loss) else keep * self.loss + (1 - keep) * loss
        self.error = error if math.isnan(self.error) else keep * self.error + (1 - keep) * error
        if (step + 1) % _LOG_EVERY == 0:
            self._rows.append((step + 1, self.loss, self.error, float(self.rates.get_last_lr()[0])))

    def save(self, step: int) -> None:
        """Save the state under a temporary name, rename it, then remove the one before."""
        older = list(self.folder.glob("state-*"))
        temporary = self.folder / f".state-{step}"
        self.accelerator.save_state(str(temporary))
        temporary.replace(self.folder / f"state-{step}")
        for path in older:
            shutil.rmtree(path)
        self._append("log.csv", ("step", "loss", "goal_error", "rate"), self._rows)
        self._rows = []

    def curve(self, step: int, numbers: dict[str, float]) -> None:
        """One row of the learning curve."""
        self._append("curve.csv", ("step", *numbers), [(step, *numbers.values())])

    def _append(self, name: str, header: tuple[str, ...], rows: list[Any]) -> None:
        path = self.folder / name
        fresh = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(header)
            writer.writerows(rows)

    def _forget_after(self, step: int) -> None:
        """Drop rows of steps that will be run again."""
        for name in ("log.csv", "curve.csv"):
            path = self.folder / name
            if path.exists():
                header, *rows = path.read_text().splitlines()
                kept = [header, *(row for row in rows if int(row.split(",")[0]) <= step)]
                write_file(path, ("\n".join(kept) + "\n").encode())
