"""What training sparse autoencoders costs: rows per second collected and trained, against sae-lens in the same run.

Both train TopK autoencoders with the same weights, rows and batch, each by its own training step. Nothing is timed
unless both have the same loss and the same gradients at the start.
"""

# sae-lens is an environment of its own
# pyright: reportMissingImports=false

import argparse
import importlib.metadata
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from harness import RESULTS, Row, check_targets, compare, in_turns, machine, report, show, write_json
from rich.console import Console
from torch import Tensor

from hooked_vla import HookedVLA, get_spec
from hooked_vla.lerobot import OBS_STATE, OBS_TOKEN_MASK, OBS_TOKENS, image_key
from hooked_vla.registry import build_network
from hooked_vla.sae.config import SAEConfig
from hooked_vla.sae.memory import training_bytes
from hooked_vla.sae.presets import preset
from hooked_vla.sae.run_folder import RunFolder
from hooked_vla.sae.source import TensorSource
from hooked_vla.sae.trainer import Run
from hooked_vla.spec import FlowVLASpec

OURS, THEIRS = "ours", "sae-lens"
SPARSE = "sae-lens, sparse activations"
ALONE = "collected alone"
# the target: twice as many rows a second
LIMIT = 0.5
K, EXPANSION = 64, 8
LAYERS = 2
# the same maths in another order of operations, which swaps the k-th feature of a few tokens in a thousand
AGREE = 1e-2


@dataclass(frozen=True)
class Size:
    """A width, and rows a step."""

    d: int
    batch: int
    dead: bool = False

    @property
    def name(self) -> str:
        return f"d {self.d}, m {EXPANSION * self.d}, {self.batch} rows" + (", half of the features dead" * self.dead)


def config_of(size: Size, site: str) -> SAEConfig:
    """Ours, as close to sae-lens's training as it gets: free decoder rows, its clipping and error, no decay."""
    return preset(
        "hooked", "bench", site, size.d, steps=1_000_000, batch_size=size.batch, architecture="topk", k=K, loss="sum",
        n_features=EXPANSION * size.d,
        normalisation="none", rate=3e-4, warmup=0, decay_from=None, clip=1.0, unit_decoder=False, init_rows=512,
        aux_k=size.d // 2, aux_weight=1.0, dead_after=10**9,
    )  # fmt: skip


class Collector:
    """A small policy with SmolVLA's expert at its published width, LAYERS deep: rows of its residual stream."""

    def __init__(self, rows: int, device: str) -> None:
        full, tiny = get_spec("smolvla"), get_spec("smolvla", "tiny")
        assert isinstance(full, FlowVLASpec) and isinstance(tiny, FlowVLASpec)
        expert = replace(full.expert.decoder, n_layers=LAYERS)
        vlm = replace(full.vlm, n_layers=LAYERS, d_vocab=512)
        spec = replace(
            tiny, vlm=vlm, expert=replace(full.expert, decoder=expert, schedule=full.expert.schedule[:LAYERS]),
            flow=full.flow,
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = HookedVLA.from_network(spec, build_network(spec).eval()).to(device)
        self.sites = [f"expert.blocks.{i}.hook_resid_post" for i in range(LAYERS)]
        self.width, self.generator = expert.d_model, torch.Generator().manual_seed(0)
        self.device = device
        per_row = spec.flow.chunk * spec.flow.n_steps
        self.batch = -(-rows // per_row)
        self.rows = self.batch * per_row

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        """Rows of every site, from one pass over new observations."""
        spec, b, g = self.model.spec, self.batch, self.generator
        assert isinstance(spec, FlowVLASpec)
        given = {image_key(c): torch.rand(b, 3, 64, 64, generator=g) for c in spec.features.cameras}
        given[OBS_STATE] = torch.randn(b, spec.features.d_state, generator=g)
        given[OBS_TOKENS] = torch.randint(0, 512, (b, 30), generator=g)
        given[OBS_TOKEN_MASK] = torch.ones(b, 30, dtype=torch.bool)
        noise = torch.randn(b, spec.flow.chunk, spec.flow.d_action, generator=g)
        given, noise = {name: each.to(self.device) for name, each in given.items()}, noise.to(self.device)
        _, cache = self.model.run_with_cache(given, self.sites, noise=noise)
        return {site: cache[site].flatten(0, -2) for site in self.sites}


class LiveSource(TensorSource):
    """Every batch is collected when it is asked for."""

    def __init__(self, collector: Collector) -> None:
        super().__init__(collector())
        self.collector = collector

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        while True:
            rows = self.collector()
            yield {site: each[:batch_size] for site, each in rows.items()}


class Ours:
    """Our training step."""

    def __init__(
        self, source: TensorSource, sites: Sequence[str], size: Size, folder: Path, device: str = "cpu"
    ) -> None:
        configs = [config_of(size, site) for site in sites]
        self.run = Run(source, configs, Accelerator(cpu=device == "cpu"), RunFolder(folder, configs, True), 10**9)
        self.number, self.dead = 0, size.dead

    def __call__(self) -> None:
        for objective in self.run.objectives:
            if self.dead:
                # whether or not they were active: half of the features count as dead in every step, as in theirs
                objective.silent[::2] = 2 * 10**9
        self.run.step(self.number)
        self.number += 1


class Theirs:
    """sae-lens's training step, one trainer for each site, on weights that are ours."""

    def __init__(self, rows: Callable[[], Mapping[str, Tensor]], ours: Ours, size: Size, sparse: bool) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.rows, self.trainers, self.size = rows, {}, size
        for objective in ours.run.objectives:
            sae = TopKTrainingSAE(
                TopKTrainingSAEConfig(
                    d_in=size.d, d_sae=EXPANSION * size.d, k=K, use_sparse_activations=sparse,
                    # theirs fails with both
                    rescale_acts_by_decoder_norm=not sparse,
                    device=str(objective.sae.w_enc.device),
                )
            )  # fmt: skip
            with torch.no_grad():
                sae.W_enc.copy_(objective.sae.w_enc.T)
                sae.W_dec.copy_(objective.sae.w_dec)
                sae.b_dec.copy_(objective.sae.b_dec)
            config = SAETrainerConfig(
                n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, autocast=False,
                device=str(objective.sae.w_enc.device),
                total_training_samples=10**9, lr=3e-4, lr_end=3e-4, lr_scheduler_name="constant", lr_warm_up_steps=0,
                adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, dead_feature_window=10**6,
                train_batch_size_samples=size.batch, feature_sampling_window=10**6,
                logger=LoggingConfig(log_to_wandb=False),
            )  # fmt: skip
            self.trainers[objective.sae.config.site] = SAETrainer(config, sae, iter(()))

    def __call__(self) -> None:
        for site, rows in self.rows().items():
            trainer = self.trainers[site]
            if self.size.dead:
                trainer.n_forward_passes_since_fired[::2] = 2 * 10**6
            trainer.step(rows[: self.size.batch])


def check_agreement(ours: Ours, theirs: Theirs, rows: Mapping[str, Tensor]) -> float:
    """How far gradients are apart, relative to their length, the worst of them, while no feature is dead: the two weigh
    AuxK's term differently. Raises ValueError beyond rounding."""
    from sae_lens.saes.sae import TrainStepInput

    worst = 0.0
    for objective in ours.run.objectives:
        x = rows[objective.sae.config.site]
        sae = theirs.trainers[objective.sae.config.site].sae
        given = TrainStepInput(x, {}, None, 0, False)
        mine = torch.autograd.grad(
            objective(x, 0).loss, [objective.sae.w_enc, objective.sae.w_dec, objective.sae.b_dec]
        )
        their = torch.autograd.grad(sae.training_forward_pass(given).loss, [sae.W_enc, sae.W_dec, sae.b_dec])
        for a, b in zip(mine, (their[0].T, *their[1:]), strict=True):
            worst = max(worst, float((a - b).norm() / b.norm()))
    if not worst < AGREE:
        raise ValueError(f"gradients differ from sae-lens's by {worst:g} of their length: nothing is timed")
    return worst


def measure(size: Size, rows: Mapping[str, Tensor], rounds: int, sparse: bool, device: str) -> tuple[list[Row], float]:
    """Training alone, on rows that are there."""
    source = TensorSource({site: each.contiguous() for site, each in rows.items()})
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(source, list(rows), size, Path(folder), device)
        found: dict[str, Callable[[], object]] = {OURS: ours}
        batches = {name: source.batches(size.batch) for name in (THEIRS, SPARSE)}
        variants = {THEIRS: False} | ({SPARSE: True} if sparse else {})
        for name, sparsely in variants.items():
            found[name] = Theirs(lambda name=name: next(batches[name]), ours, size, sparsely)
        first = {site: each[: size.batch] for site, each in rows.items()}
        theirs = found[THEIRS]
        assert isinstance(theirs, Theirs)
        worst = check_agreement(ours, theirs, first)
        times = in_turns(found, rounds, 1, size.name, device=device)
    return compare(times, f"trained: {size.name}", list(variants)), worst


def measure_live(size: Size, collector: Collector, rounds: int) -> tuple[list[Row], dict[str, float]]:
    """Collected and trained, every site's autoencoder from one pass on both sides."""
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(LiveSource(collector), collector.sites, size, Path(folder), collector.device)
        variants = {OURS: ours, THEIRS: Theirs(collector, ours, size, False),
                    SPARSE: Theirs(collector, ours, size, True), ALONE: collector}  # fmt: skip
        times = in_turns(variants, rounds, 1, "collected and trained", device=collector.device)
    name = f"collected and trained: {LAYERS} sites, {size.name}"
    rows = [row for row in compare(times, name, [THEIRS, SPARSE]) if row.variant == OURS]
    trained = LAYERS * size.batch
    speeds = {f"{each} rows/s": round(trained / median(times[each]), 1) for each in (OURS, THEIRS, SPARSE)}
    share = median(times[ALONE]) / median(times[OURS])
    return rows, speeds | {"share of collecting in ours": round(share, 3)}


def _measured_bytes(size: Size, device: str, connection: Any) -> None:
    """In a process of its own: what a few steps add to the most memory it ever held, on a GPU to what it allocated."""
    torch.set_num_threads(1)
    source = TensorSource({"site": torch.randn(2 * size.batch, size.d, device=device)})
    with tempfile.TemporaryDirectory() as folder:
        # the memory that code takes when it first runs is not training's
        Ours(TensorSource({"site": torch.randn(64, 8, device=device)}), ["site"], Size(8, 64), Path(folder), device)()
    # the most so far is forgotten
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()
    before = _status_bytes("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()
    with tempfile.TemporaryDirectory() as folder:
        run = Ours(source, ["site"], size, Path(folder), device)
        for _ in range(3):
            run()
    most = _status_bytes("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
    connection.send(most - before)


def _status_bytes(name: str) -> int:
    """A figure of Linux's about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def memory(size: Size, device: str = "cpu") -> dict[str, str | float]:
    """Megabytes of training, by the formula and measured (on Linux, or on a GPU)."""
    mine, other = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_measured_bytes, args=(size, device, other))
    process.start()
    # a process that fails leaves nothing to wait for
    other.close()
    measured = mine.recv()
    process.join()
    config = config_of(size, "site")
    # where nothing is dead, nothing is held for it
    formula = training_bytes([config if size.dead else config.changed(aux_k=0)])
    return {"size": size.name, "formula_mb": round(formula / 1e6, 1), "measured_mb": round(measured / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="width 720 and small batches only")
    parser.add_argument("--rounds", type=int, help="calls of each variant (default 5, quick 3)")
    parser.add_argument("--batch", type=int, help="rows of a step (default 4096, quick 1024)")
    parser.add_argument("--json", type=Path, help="where the result goes (default results/bench_sae_DEVICE.json)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where both train")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU on this machine")
    try:
        versions = {name: importlib.metadata.version(name) for name in ("sae-lens", "transformer-lens")}
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install 'sae-lens>=6.54,<7'") from error
    rounds, batch = options.rounds or (3 if options.quick else 5), options.batch or (1024 if options.quick else 4096)
    collector = Collector(batch, device)
    small, large = Size(collector.width, batch), Size(1024, batch)
    sizes = [small] if options.quick else [small, large, replace(small, dead=True), replace(large, dead=True)]
    generator = torch.Generator().manual_seed(0)
    given = collector()
    rows: list[Row] = []
    agreement = {}
    for size in sizes:
        site = collector.sites[-1]
        tokens = given[site] if size.d == collector.width else torch.randn(2 * batch, size.d, generator=generator)
        given_rows = {site: tokens.to(device)}
        found, agreement[size.name] = measure(size, given_rows, rounds, not size.dead, device)
        rows += found
    live, speeds = measure_live(small, collector, rounds)
    rows += live
    targets = check_targets(rows, {(row.size, OURS): LIMIT for row in rows if row.variant == OURS})
    kept = [memory(size, device) for size in sizes]
    about = {
        "machine": machine(options.threads, device), "versions": versions, "k": K, "rounds": rounds,
        "relative difference of gradients": agreement, "collected and trained": speeds, "memory": kept,
        "sizes": [asdict(size) for size in sizes],
    }  # fmt: skip
    show(Console(), rows, targets)
    Console().print_json(json.dumps({"collected and trained": speeds, "memory": kept}))
    write_json(options.json or RESULTS / f"bench_sae_{device}.json", report(rows, targets, about))


if __name__ == "__main__":
    main()
