"""What a patching sweep costs: every residual site × segment of a trained tabletop policy, patched one by one.

The reference is what one writes by hand: a forward pass a cell, with an ordinary hook function. Against it, the same
cells as rows of a batch, from the start and resumed from the first patch. Whole sweeps are timed, with the donor's run
and the table; nothing is timed before all agree on every effect.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from harness import RESULTS, Row, check_targets, compare, in_turns, machine, report, show, write_json
from rich.console import Console
from torch import Tensor

from hooked_vla import HookedVLA, HookPoint, Observation
from hooked_vla.analysis.metrics import recovery
from hooked_vla.analysis.patching import RESIDUALS, activation_patching
from hooked_vla.inputs import VLAInputs

BY_HAND, BATCHED, RESUMED = "one forward a cell", "rows of a batch", "rows of a batch, resumed"
MODELS = ("pi05-tabletop", "smolvla-tabletop")
# a sweep of three times the speed of one forward pass a site
LIMITS = {("pi05-tabletop", RESUMED): 1 / 3}
ROUNDS, QUICK_ROUNDS = 5, 1
# of an effect, whose scale is 0 for the patched run and 1 for the donor's; float32, other kernels
MAX_DIFFERENCE = 1e-3


def scene(model: HookedVLA, seed: int, instruction: str) -> VLAInputs:
    """Preprocessed inputs of one row."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (len(model.spec.features.cameras), 96, 96, 3), generator=generator)
    images = {camera: pixels[i].to(torch.uint8) for i, camera in enumerate(model.spec.features.cameras)}
    state = torch.randn(model.spec.features.d_state or 0, generator=generator)
    inputs = model.prepare(Observation(images, state, instruction))
    assert isinstance(inputs, VLAInputs)
    return inputs


def residuals(model: HookedVLA) -> list[str]:
    """All residual sites: of the vision tower, the prefix and the expert."""
    leaves = {glob.removeprefix("*.") for glob in RESIDUALS}
    return [name for name in model.points if name.rpartition(".")[2] in leaves]


def sweep_by_hand(
    model: HookedVLA, clean: VLAInputs, corrupted: VLAInputs, noise: Tensor, cells: list[tuple[str, str, int | None]]
) -> list[float]:
    """One forward pass a cell, with an ordinary hook."""
    sites = list(dict.fromkeys(site for site, _, _ in cells))
    with torch.no_grad():
        donor, cache = model.run_with_cache(clean, sites, noise=noise)
        base = model(corrupted, noise)
        assert donor is not None
        effects = []
        for site, segment, step in cells:
            source = cache[site] * 1

            def patch(value: Tensor, hook: HookPoint, source: Tensor = source, segment: str = segment) -> Tensor:
                assert hook.segments is not None
                theirs = source if hook.denoise_step is None else source[hook.denoise_step]
                return torch.where(hook.segments.mask(segment)[..., None], theirs, value)

            steps = None if step is None else [step]
            actions = model.run_with_hooks(corrupted, [(site, patch)], noise=noise, at_steps=steps)
            effects.append(float(recovery(actions.normalized, base.normalized, donor.normalized)))
    return effects


def variants_of(name: str, each_step: bool, batch_rows: int) -> tuple[dict[str, Callable[[], list[float]]], int]:
    """Every variant as a function that sweeps and returns effects; and how many cells there are."""
    model = HookedVLA.from_pretrained(name).requires_grad_(False)
    clean = scene(model, 0, "put the red block on the orange pad")
    corrupted = scene(model, 1, "put the blue block on the gray pad")
    head: Any = model.net.head
    noise = torch.randn(1, head.chunk, head.d_action, generator=torch.Generator().manual_seed(2))
    sites = [site for site in residuals(model) if not each_step or site.startswith("expert.")]
    steps = range(model.n_denoise_steps) if each_step else None

    def sweep(resume: bool) -> Any:
        return activation_patching(
            model, clean, corrupted, sites, None, steps, noise=noise, batch_rows=batch_rows, resume=resume
        ).table

    table = sweep(False)
    cells = [
        (row["site"], row["segment"], None if not each_step else int(row["denoise_step"]))
        for row in table.to_dict("records")
    ]
    return {
        BY_HAND: lambda: sweep_by_hand(model, clean, corrupted, noise, cells),
        BATCHED: lambda: sweep(False)["effect"].tolist(),
        RESUMED: lambda: sweep(True)["effect"].tolist(),
    }, len(cells)


def check_agreement(variants: dict[str, Callable[[], list[float]]]) -> float:
    """The largest difference between the effects of two variants. Raises ValueError when that is more than rounding."""
    effects = {name: np.array(run()) for name, run in variants.items()}
    worst = max(float(np.abs(each - effects[BY_HAND]).max()) for each in effects.values())
    if worst > MAX_DIFFERENCE or np.abs(effects[BY_HAND]).max() < 0.1:
        raise ValueError(f"effects differ by {worst:g}, or are all small: not timed")
    return worst


def main(
    quick: Annotated[bool, typer.Option("--quick", help="one round of the first model's sweep over all steps")] = False,
    json_file: Annotated[Path, typer.Option("--json", help="where the result goes")] = (
        RESULTS / "bench_patching_cpu.json"
    ),
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    rounds: Annotated[int | None, typer.Option(help="of every variant")] = None,
    batch_rows: Annotated[int, typer.Option(help="rows of a forward pass")] = 32,
) -> None:
    """Measure patching sweeps over all residual sites."""
    torch.set_num_threads(threads)
    console = Console()
    rows: list[Row] = []
    sizes = {}
    plan = [(name, each_step) for name in MODELS for each_step in (False, True)]
    for name, each_step in plan[:1] if quick else plan:
        label = f"{name}, each denoise step of the expert" if each_step else name
        variants, n_cells = variants_of(name, each_step, batch_rows)
        n_rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
        sizes[label] = {"cells": n_cells, "rounds": n_rounds, "max_effect_difference": check_agreement(variants)}
        rows += compare(in_turns(variants, n_rounds, 0, label), label, [BY_HAND])
    targets = check_targets(rows, LIMITS)
    show(console, rows, targets)
    about = {"machine": machine(threads), "batch_rows": batch_rows, "sizes": sizes}
    write_json(json_file, report(rows, targets, about))
    console.print(f"written: {json_file}")


if __name__ == "__main__":
    typer.run(main)
