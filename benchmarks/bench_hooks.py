"""What looking into SmolVLA costs: an action chunk with nothing hooked, with caches and with a patch, against native.

The native reference is LeRobot's own policy with the same weights, where it can be imported; besides, and otherwise,
our network with its hook points stripped out of the code. Nothing is timed before all agree on the actions.
"""

import gc
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import torch
import typer
from harness import RESULTS, Row, check_targets, compare, in_turns, machine, per_call_us, report, show, write_json
from rich.console import Console
from stripped import stripped
from torch import Tensor, nn

from hooked_vla import HookedVLA, HookPoint
from hooked_vla.lerobot import OBS_STATE, OBS_TOKEN_MASK, OBS_TOKENS, image_key
from hooked_vla.spec import FlowVLASpec

STRIPPED = "no hook points"
AGAIN = "reference again"
NO_HOOKS, RESIDUALS, EVERYTHING, PATCH = "no hooks", "all residuals cached", "everything cached", "one patch"
FUSED = "everything but scores and patterns cached"
# our budget: ratios to a native forward pass
LIMITS = {("full", NO_HOOKS): 1.02, ("tiny", NO_HOOKS): 1.05, ("tiny", EVERYTHING): 1.2}
# the first calls of a size touch fresh memory; a full-size chunk takes seconds, a tiny one milliseconds
ROUNDS = {"tiny": 200, "full": 6}
QUICK_ROUNDS = 60
WARMUP = {"tiny": 5, "full": 1}
CAMERA_PIXELS = {"tiny": 64, "full": 256}
# as the public checkpoint pads its instructions
N_TEXT = {"tiny": 30, "full": 48}
# float32, the same maths in another order of operations
MAX_DIFFERENCE = 1e-4

Baseline = Literal["auto", "lerobot", "stripped"]


def example(spec: FlowVLASpec, size: str) -> tuple[dict[str, Tensor], Tensor]:
    """A preprocessed batch of one row, and noise."""
    generator = torch.Generator().manual_seed(0)
    pixels = CAMERA_PIXELS[size]
    batch = {image_key(c): torch.rand(1, 3, pixels, pixels, generator=generator) for c in spec.features.cameras}
    batch[OBS_STATE] = torch.randn(1, spec.features.d_state, generator=generator)
    batch[OBS_TOKENS] = torch.randint(0, spec.vlm.d_vocab or 1, (1, N_TEXT[size]), generator=generator)
    batch[OBS_TOKEN_MASK] = torch.ones(1, N_TEXT[size], dtype=torch.bool)
    return batch, torch.randn(1, spec.flow.chunk, spec.flow.d_action, generator=generator)


def is_fused_away(name: str) -> bool:
    """Whether looking at the point takes attention off its fused kernel."""
    return name.endswith(("hook_attn_scores", "hook_pattern"))


def native_policy(model: HookedVLA, baseline: Baseline) -> tuple[str, Any] | None:
    """LeRobot's name with version and its policy around our weights; None where it is not wanted or not there.

    Raises ImportError where it is wanted by name and not there.
    """
    if baseline == "stripped":
        return None
    sys.path.append(str(Path(__file__).parent.parent / "tests" / "live"))
    compat = importlib.import_module("lerobot_compat")
    try:
        compat.install()
    except ImportError:
        if baseline == "lerobot":
            raise
        return None
    return f"LeRobot {compat.VERSION}", compat.policy_around(model)


def variants_of(
    model: HookedVLA, native: tuple[str, Any] | None, batch: dict[str, Tensor], noise: Tensor
) -> dict[str, Callable[[], Any]]:
    """Every variant as a function that makes one action chunk; the first is the reference."""
    assert isinstance(model.spec, FlowVLASpec)
    bare = HookedVLA(model.spec, stripped(model.spec, model.net), model.processor)
    middle = f"expert.blocks.{model.spec.expert.decoder.n_layers // 2}.hook_resid_post"

    def patch(value: Tensor, hook: HookPoint) -> Tensor:
        value = value.clone()
        value[:, 0] = 0
        return value

    def cached(names_filter: Any) -> Any:
        with torch.no_grad():
            return model.run_with_cache(batch, names_filter, noise=noise)

    def patched() -> Any:
        with torch.no_grad():
            return model.run_with_hooks(batch, [(middle, patch)], noise=noise)

    variants: dict[str, Callable[[], Any]] = {}
    if native is not None:
        name, policy = native
        variants[name] = lambda: policy.predict_action_chunk(dict(batch), noise=noise)
    variants |= {
        STRIPPED: lambda: bare.predict_action_chunk(batch, noise=noise),
        NO_HOOKS: lambda: model.predict_action_chunk(batch, noise=noise),
        RESIDUALS: lambda: cached("*.hook_resid_*"),
        FUSED: lambda: cached(lambda each: not is_fused_away(each)),
        EVERYTHING: lambda: cached(None),
        PATCH: patched,
    }
    reference = next(iter(variants.values()))
    return variants | {AGAIN: lambda: reference()}


def check_agreement(variants: dict[str, Callable[[], Any]]) -> float:
    """The largest difference between the actions of two variants that edit nothing.

    Raises ValueError when that is more than rounding.
    """
    expected, worst = next(iter(variants.values()))(), 0.0
    for name, run in variants.items():
        if name == PATCH:
            continue
        result = run()
        actions = result if isinstance(result, Tensor) else result[0].chunk
        difference = float((actions - expected).abs().max())
        if difference > MAX_DIFFERENCE:
            raise ValueError(f"{name!r} differs from the reference by {difference:g}: not timed")
        worst = max(worst, difference)
        del result
    return worst


def count_taps(run: Callable[[], Any]) -> int:
    """How many hook points a run passes."""
    passed = 0
    original = HookPoint.__call__

    def counting(point: HookPoint, value: Tensor) -> Tensor:
        nonlocal passed
        passed += 1
        return original(point, value)

    with mock.patch.object(HookPoint, "__call__", counting):
        run()
    return passed


def measure(size: str, baseline: Baseline, rounds: int, console: Console) -> tuple[list[Row], dict[str, Any]]:
    """The rows of a size, and what else is known of it."""
    model = HookedVLA.from_spec("smolvla", size=size)
    assert isinstance(model.spec, FlowVLASpec)
    native = native_policy(model, baseline)
    batch, noise = example(model.spec, size)
    variants = variants_of(model, native, batch, noise)
    baselines = [STRIPPED] if native is None else [native[0], STRIPPED]
    console.print(f"{size}: reference is {baselines[0]}; {rounds} rounds of {len(variants)} variants in turns")
    about = {
        "reference": baselines[0],
        "rounds": rounds,
        "max_action_difference": check_agreement(variants),
        "hook_points": len(model.points),
        "taps_per_chunk": count_taps(variants[NO_HOOKS]),
        "cache_mb": {
            name: round(model.cache_size(batch, names) / 1e6, 1)
            for name, names in ((RESIDUALS, "*.hook_resid_*"), (EVERYTHING, None))
        },
    }
    rows = compare(in_turns(variants, rounds, WARMUP[size], f"{size} size"), size, baselines)
    # timed twice, the reference shows how far two equal variants come apart
    return [row for row in rows if row.variant != AGAIN or row.baseline == baselines[0]], about


def main(
    quick: Annotated[bool, typer.Option("--quick", help="tiny only, in under a minute")] = False,
    size: Annotated[str, typer.Option(help="tiny, full (about 10 GB of memory) or both")] = "both",
    json_file: Annotated[Path, typer.Option("--json", help="where the result goes")] = RESULTS / "bench_hooks_cpu.json",
    baseline: Annotated[str, typer.Option(help="auto, lerobot or stripped")] = "auto",
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    rounds: Annotated[int | None, typer.Option(help="in place of the size's own number")] = None,
) -> None:
    """Measure the cost of hooks, caches and a patch on SmolVLA."""
    if size not in ("tiny", "full", "both") or baseline not in ("auto", "lerobot", "stripped"):
        raise typer.BadParameter(f"size {size!r} or baseline {baseline!r} is unknown")
    torch.set_num_threads(threads)
    console = Console()
    rows: list[Row] = []
    sizes = {}
    for each in ["tiny"] if quick else ["tiny", "full"] if size == "both" else [size]:
        found, sizes[each] = measure(each, baseline, rounds or (QUICK_ROUNDS if quick else ROUNDS[each]), console)
        rows += found
        gc.collect()
    value = torch.zeros(1, 8, 48)
    idle = {
        "hook_point_us": round(per_call_us(HookPoint("batch seq d_model"), value), 3),
        "nn_identity_us": round(per_call_us(nn.Identity(), value), 3),
    }
    targets = check_targets(rows, LIMITS)
    show(console, rows, targets)
    console.print(
        f"an idle hook point costs {idle['hook_point_us']} µs a call; nn.Identity {idle['nn_identity_us']} µs"
    )
    write_json(json_file, report(rows, targets, {"machine": machine(threads), "sizes": sizes, "idle_call": idle}))
    console.print(f"written: {json_file}")


if __name__ == "__main__":
    typer.run(main)
