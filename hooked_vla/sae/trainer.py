"""Training: several autoencoders from one pass over a source, through accelerate, resumable to the bit.

The main process asks the source and hands every process its share of each batch, so that a run on several processes
sees what a run on one sees.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.config import SAEConfig
from hooked_vla.sae.losses import Objective, Terms, alone
from hooked_vla.sae.resample import resample
from hooked_vla.sae.run_folder import RunFolder
from hooked_vla.sae.source import PREVIOUS, Source, check_finite

Rows = dict[str, Tensor]


def train(
    source: Source,
    configs: Sequence[SAEConfig],
    out: str | Path,
    device: str = "cpu",
    save_every: int = 500,
    log_every: int = 50,
    progress: bool = True,
    rows: Mapping[str, Any] | None = None,
) -> list[SparseAutoencoder]:
    """Train an autoencoder for each config, all on the same batches; the trained ones, in that order.

    out: OUT/<site>/ gets each autoencoder (`SparseAutoencoder.from_pretrained`) and its log.csv, averages over
    log_every steps; OUT/state-* what an interrupted run goes on from, saved every save_every steps (rounded up
    to a multiple of log_every). rows: plain values that say what the source reads, which must be the same when the run
    goes on. The same call goes on where it was stopped, to the bit on the same machine, and returns what is there where
    it had finished. Started by `accelerate launch`, it runs on all of its processes. Under the same seeds the result is
    the same.
    Raises ValueError for sites that the source has not, other widths, configs that differ in steps or batch_size,
    activations that are constant or not finite (naming site and step), a source that ends early, and an `out` that was
    begun with other configs or rows; BlockingIOError where another process trains there.
    """
    configs = list(configs)
    check(source, configs)
    accelerator = Accelerator(cpu=torch.device(device).type == "cpu")
    schedule = configs[0].schedule
    save_every = -(-save_every // log_every) * log_every
    if schedule.batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size {schedule.batch_size} does not divide among {accelerator.num_processes} processes"
        )
    if accelerator.num_processes > 1 and any(config.schedule.contrast for config in configs):
        raise ValueError("temporal contrasts every token with all others of its batch: train it on one process")
    with RunFolder.open(Path(out), configs, accelerator.is_main_process, rows or {}) as folder:
        accelerator.wait_for_everyone()
        if folder.finished():
            return [SparseAutoencoder.from_pretrained(each, accelerator.device) for each in folder.of_each]
        run = Run(source, configs, accelerator, folder, log_every)
        with tqdm(
            total=schedule.steps * schedule.batch_size, initial=run.done * schedule.batch_size, desc="SAEs",
            unit="row", unit_scale=True, disable=not (progress and accelerator.is_main_process),
        ) as bar:  # fmt: skip
            for number in range(run.done, schedule.steps):
                run.step(number)
                bar.update(schedule.batch_size)
                if run.news:
                    bar.set_postfix(run.news, refresh=False)
                if (number + 1) % save_every == 0 or number + 1 == schedule.steps:
                    run.save(number + 1)
        return run.finish()


def check(source: Source, configs: Sequence[SAEConfig]) -> None:
    """Raises ValueError unless the configs go together, the source has what they read, and something makes codes
    sparse."""
    if not configs:
        raise ValueError("no autoencoder to train: configs is empty")
    shared = {(config.schedule.steps, config.schedule.batch_size) for config in configs}
    if len(shared) > 1:
        raise ValueError(f"all configs must have the same steps and batch_size, got {sorted(shared)}")
    widths = source.widths
    for config in configs:
        if config.k is None and not config.schedule.penalty:
            raise ValueError(
                f"{config.label}: {config.architecture} is sparse by its penalty alone, which must be above 0"
            )
        read = {config.site: config.d_model, config.target: config.d_decoded}
        if config.architecture == "temporal":
            read[config.site + PREVIOUS] = config.d_model
        for site, width in read.items():
            if site not in widths:
                raise ValueError(f"{config.label}: the source has no {site}; it has {list(widths)}")
            if widths[site] != width:
                raise ValueError(f"{config.label}: {site} is {widths[site]} wide, the config says {width}")
        if not any(set(read) <= set(group) for group in source.groups):
            raise ValueError(f"{config.label}: rows of {' and '.join(read)} do not belong together in this source")


class _Ensemble(nn.Module):
    """All objectives as one module, which is what accelerate wraps."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.objectives = nn.ModuleList(objectives)

    def forward(self, rows: Rows, number: int) -> list[Terms]:
        found = []
        for objective in self.objectives:
            assert isinstance(objective, Objective)
            config = objective.sae.config
            output = None if config.output_site is None else rows[config.output_site]
            previous = rows[config.site + PREVIOUS] if config.architecture == "temporal" else None
            found.append(objective(rows[config.site], number, output, previous))
        return found


class _SourceState:
    """The source as accelerate saves and loads it: in the main process, which alone reads from it."""

    def __init__(self, source: Source, main: bool) -> None:
        self.source, self.main = source, main

    def state_dict(self) -> dict[str, Any]:
        return dict(self.source.state_dict()) if self.main else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.main:
            self.source.load_state_dict(state)


class Run:
    """One training run, step by step; `train` is what makes one of it. done: steps that a saved state has seen; news:
    figures for the progress bar."""

    def __init__(
        self, source: Source, configs: Sequence[SAEConfig], accelerator: Accelerator, folder: RunFolder, log_every: int
    ) -> None:
        self.source, self.configs, self.accelerator, self.folder = source, configs, accelerator, folder
        self.schedule, self.log_every = configs[0].schedule, log_every
        self.news: dict[str, str] = {}
        gather = self._gathered if accelerator.num_processes > 1 else alone
        self.objectives = [Objective(SparseAutoencoder(config), gather).to(accelerator.device) for config in configs]
        groups = [
            {"params": list(each.parameters()), "lr": each.sae.config.schedule.rate,
             "betas": each.sae.config.schedule.betas, "eps": each.sae.config.schedule.eps}
            for each in self.objectives
        ]  # fmt: skip
        # one pass over the memory for each parameter
        optimizer = torch.optim.Adam(groups, fused=accelerator.device.type in ("cpu", "cuda"))
        saved = folder.state()
        if saved is None:
            self._start()
        self.ensemble, self.optimizer = accelerator.prepare(_Ensemble(self.objectives), optimizer)
        accelerator.register_for_checkpointing(_SourceState(source, accelerator.is_main_process))
        self.done = 0
        if saved is not None:
            self.done = saved[0]
            accelerator.load_state(str(saved[1]))
            folder.forget_after(self.done)
        self.batches = self._batches()
        self.window: list[list[Tensor]] = []

    def _gathered(self, values: Tensor) -> Tensor:
        return torch.as_tensor(self.accelerator.gather(values))

    def _start(self) -> None:
        """Normalisations and biases, from rows that are the same in all processes."""
        most = max(config.schedule.init_rows for config in self.configs)
        rows = self._everywhere(self.source.sample(most) if self.accelerator.is_main_process else None)
        assert rows is not None
        for objective in self.objectives:
            config = objective.sae.config
            for site in {config.site, config.target}:
                check_finite(site, rows[site])
            first = config.schedule.init_rows
            output = None if config.output_site is None else rows[config.output_site][:first]
            objective.start(rows[config.site][:first], output)

    def _batches(self) -> Iterator[Rows]:
        """Whole batches, on this process's device, endless."""
        read = self.source.batches(self.schedule.batch_size) if self.accelerator.is_main_process else None
        number = self.done
        while True:
            rows = self._everywhere(None if read is None else next(read, {}))
            n = len(next(iter(rows.values()))) if rows else 0
            if n != self.schedule.batch_size:
                raise ValueError(
                    f"the source ended after {number} of {self.schedule.steps} batches of {self.schedule.batch_size}"
                    + (f" and {n} rows" if n else "")
                )
            for site, each in rows.items():
                try:
                    check_finite(site, each)
                except ValueError as error:
                    raise ValueError(f"batch {number + 1}: {error}") from error
            yield rows
            number += 1

    def _everywhere(self, rows: Rows | None) -> Rows:
        """Rows of the sites that are trained on; the main process's, in all of them."""
        wanted = {site for config in self.configs for site in (config.site, config.target)}
        wanted |= {config.site + PREVIOUS for config in self.configs if config.architecture == "temporal"}
        device = self.accelerator.device
        if rows is not None:
            rows = {site: each.to(device) for site, each in sorted(rows.items()) if site in wanted}
        if self.accelerator.num_processes == 1:
            assert rows is not None
            return rows
        shapes = {site: (tuple(each.shape), each.dtype) for site, each in (rows or {}).items()}
        [shapes] = broadcast_object_list([shapes])
        empty = {site: torch.empty(shape, dtype=dtype, device=device) for site, (shape, dtype) in shapes.items()}
        return broadcast(rows if rows is not None else empty)  # pyright: ignore[reportReturnType]

    def step(self, number: int) -> None:
        """One step of all autoencoders."""
        whole = next(self.batches)
        share = self.schedule.batch_size // self.accelerator.num_processes
        first = self.accelerator.process_index * share
        found = self.ensemble({site: rows[first : first + share] for site, rows in whole.items()}, number)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(torch.stack([terms.loss for terms in found]).sum())
        for objective, group in zip(self.objectives, self.optimizer.param_groups, strict=True):
            settle_gradients(objective)
            group["lr"] = objective.sae.config.schedule.rate * objective.sae.config.schedule.factor(number)
        self.optimizer.step()
        self._after(number, whole, found)

    @torch.no_grad()
    def _after(self, number: int, whole: Rows, found: Sequence[Terms]) -> None:
        """What is not the optimiser's: lengths of decoder rows, which features are dead, the log."""
        fired = torch.cat([terms.fired for terms in found])
        told = torch.stack([torch.stack([t.loss.detach(), t.fvu, t.l0, t.aux]) for t in found])
        if self.accelerator.num_processes > 1:
            fired = torch.as_tensor(self.accelerator.reduce(fired.int(), "sum")) > 0
            told = torch.as_tensor(self.accelerator.reduce(told, "mean"))
        start = 0
        for objective in self.objectives:
            config = objective.sae.config
            if config.unit_decoder:
                decoder = objective.sae.w_dec
                decoder.div_(torch.linalg.vector_norm(decoder, dim=1, keepdim=True).clamp_min(1e-12))
            own, start = fired[start : start + config.n_features], start + config.n_features
            objective.silent.copy_(torch.where(own, 0, objective.silent + self.schedule.batch_size))
            every, until = config.schedule.resample_every, config.schedule.resample_until
            if every and (number + 1) % every == 0 and (until is None or number < until):
                output = None if config.output_site is None else whole[config.output_site]
                resample(objective, self.optimizer.optimizer.state, number, whole[config.site], output)
        self._note(number, told)

    def _note(self, number: int, told: Tensor) -> None:
        dead = [(each.silent >= each.sae.config.schedule.dead_after).float().mean() for each in self.objectives]
        self.window.append([*told.unbind(0), torch.stack(dead)])
        self.news = {}
        if (number + 1) % self.log_every:
            return
        mean = torch.stack([torch.stack(step[:-1]) for step in self.window]).double().mean(0).tolist()
        last, self.window = self.window[-1][-1].tolist(), []
        rates = [each.sae.config.schedule.rate * each.sae.config.schedule.factor(number) for each in self.objectives]
        rows = [[number + 1, *figures, share, rate] for figures, share, rate in zip(mean, last, rates, strict=True)]
        self.folder.note(rows)
        self.news = {"fvu": "/".join(f"{row[2]:.3f}" for row in rows), "L0": "/".join(f"{row[3]:.0f}" for row in rows),
                     "dead": "/".join(f"{row[5]:.0%}" for row in rows)}  # fmt: skip

    def save(self, number: int) -> None:
        """Save the state after so many steps; the one before is removed."""
        self.accelerator.wait_for_everyone()
        self.folder.save(
            number, lambda path: self.accelerator.save_state(str(path)), self.accelerator.wait_for_everyone
        )

    def finish(self) -> list[SparseAutoencoder]:
        """Write the autoencoders, and remove the state."""
        made = [objective.sae.eval() for objective in self.objectives]
        for parameter in (each for sae in made for each in sae.parameters()):
            parameter.grad = None
        self.folder.finish(made)
        self.accelerator.wait_for_everyone()
        return made


def settle_gradients(objective: Objective) -> None:
    """Before the optimiser steps: of a decoder row of length 1 no gradient along itself, then the norm is clipped."""
    sae, schedule = objective.sae, objective.sae.config.schedule
    if sae.config.unit_decoder and sae.w_dec.grad is not None:
        grad, decoder = sae.w_dec.grad, sae.w_dec.detach()
        along = torch.linalg.vecdot(grad, decoder)
        grad.addcmul_(decoder, along[:, None], value=-1)
    if schedule.clip is not None:
        clip_grad_norm_(list(sae.parameters()), schedule.clip)
