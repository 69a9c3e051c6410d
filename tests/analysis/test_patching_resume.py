"""Runs that are resumed from a tape: bit for bit what the same run gives from the start, in every family."""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from public_checkpoints import make_observation, read_golden
from tolerance import assert_close
from torch import Tensor, nn

from hooked_vla import HookedVLA
from hooked_vla.analysis.patching_resume import Tape
from hooked_vla.interventions import Ablate, Edit, Scale

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

# every way in which prefix and expert are wired; one that generates, one that draws while it denoises
MODELS = ["act", "diffusion", "groot_n15", "openvla", "pi05", "smolvla", "xvla"]


@pytest.fixture(scope="module", params=MODELS)
def case(request) -> tuple[HookedVLA, dict, list[Tensor]]:
    golden = read_golden(request.param)
    noise = [golden.noise] if isinstance(golden.noise, Tensor) else golden.noise
    return HookedVLA.from_pretrained(golden.folder).requires_grad_(False), golden.batch, noise


def outcome(model: HookedVLA, obs, noise, edits: list) -> Tensor:
    """Actions, and the scores that decide them where they change by jumps only."""
    scores = fnmatch.filter(model.points, "*.hook_logits")
    with torch.no_grad():
        actions, cache = model.run_with_cache(obs, scores, noise=list(noise), edits=edits)
    return torch.cat([actions.normalized.flatten(), *(cache[name].flatten() for name in scores)])


def some_sites(model: HookedVLA) -> list[str]:
    """Residual sites of every pathway's last block, and two of attention."""
    sites = [
        name for name in model.points if name.endswith("hook_resid_post") and model.hook_points[name].reaches_action
    ]
    by_pathway = {name.split(".")[0]: name for name in sites}
    others = [name for glob in ("*.hook_v", "*.hook_pattern") for name in fnmatch.filter(model.points, glob)[-1:]]
    return list(dict.fromkeys([*by_pathway.values(), *others]))


def test_resumed_is_from_the_start_bit_for_bit(case) -> None:
    """One copy of the rows: the kernels see the same shapes."""
    model, batch, noise = case
    sites = some_sites(model)
    tape = Tape.record(model, batch, noise, sites)
    plain = outcome(model, batch, noise, [])
    inputs, draws = tape.copies(1)
    for site in sites:
        steps = model.n_denoise_steps - 1 if model.hook_points[site].denoised else None
        edits: list[Edit] = [Scale(site, 0.5, denoise=steps)]
        expected, before = outcome(model, batch, noise, edits), tape.n_skipped
        with tape.resumed(1):
            found = outcome(model, inputs, draws, edits)
        assert torch.equal(found, expected), site
        assert not torch.equal(found, plain), site
        assert tape.n_skipped > before, site


def test_copies_are_the_rows_one_by_one(case) -> None:
    """Rows under edits of their own agree with runs of their own; rows without edits with the plain run."""
    model, batch, noise = case
    sites = [site for site in some_sites(model) if model.points[site].axes[0] in ("batch", "image", "window")]
    tape = Tape.record(model, batch, noise, sites)
    rows = tape.rows
    lists: list[list[Edit]] = [[] for _ in range(rows)]
    lists += [[Scale(site, 0.5)] for site in sites for _ in range(rows)]
    found = tape.run(lists).normalized
    assert tape.n_skipped
    for i, site in enumerate([None, *sites]):
        with torch.no_grad():
            alone = model(batch, list(noise), edits=[Scale(site, 0.5)] if site else []).normalized
        assert_close(found[i * rows : (i + 1) * rows], alone)


@pytest.fixture
def tiny(tiny_model: HookedVLA) -> HookedVLA:
    return tiny_model


NOISE = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))
LATE = "expert.blocks.1.hook_resid_post"


@contextmanager
def counted_calls(net: nn.Module, names: list[str]) -> Iterator[dict[str, int]]:
    """How often modules are called, answered from a tape or not."""
    counts = dict.fromkeys(names, 0)

    def counting(name: str):
        return lambda *_: counts.update({name: counts[name] + 1})

    handles = [net.get_submodule(name).register_forward_pre_hook(counting(name)) for name in names]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def test_what_comes_before_the_first_edit_does_not_run(tiny: HookedVLA) -> None:
    tape = Tape.record(tiny, make_observation(1), NOISE, [LATE])
    names = ["vision.blocks.0", "vlm.blocks.2.mlp", "expert.blocks.0.mlp", "expert.blocks.1.mlp"]
    with counted_calls(tiny.net, names) as counts:
        tape.run([[Ablate(LATE, "zero")]])
    # what is inside of a skipped module is not called: the prefix, and the first block at the first step
    assert [counts[name] for name in names] == [0, 0, 3, 4]
    assert tape.n_skipped > 0
    assert not [module for module in tiny.net.modules() if "forward" in vars(module)]
    assert all(type(point).__name__ == "HookPoint" and not point.listeners for point in tiny.points.values())


def test_a_tape_holds_no_more_than_its_sites_need(tiny: HookedVLA) -> None:
    obs = make_observation(1)
    late = Tape.record(tiny, obs, NOISE, [LATE], n_steps=1)
    everything = Tape.record(tiny, obs, NOISE, [name for name in tiny.points if name.endswith("hook_resid_post")])
    assert 0 < late.nbytes < everything.nbytes
    assert not [call for call in late.calls if call.kept and call.module in set(tiny.net.vision.blocks.modules())]
    assert len(late.calls) < len(everything.calls)


def test_listeners_cut_the_tape_too(tiny: HookedVLA) -> None:
    """What is watched runs, with the values that it has."""
    obs, early = make_observation(1), "vision.blocks.0.hook_resid_post"
    tape = Tape.record(tiny, obs, NOISE, [LATE])
    inputs, noise = tape.copies(1)
    with torch.no_grad(), tape.resumed(1):
        _, cache = tiny.run_with_cache(inputs, [early, "expert.hook_velocity"], noise=noise)
    with torch.no_grad():
        _, expected = tiny.run_with_cache(obs, [early, "expert.hook_velocity"], noise=NOISE)
    for name in expected:
        assert torch.equal(cache[name], expected[name]), name


def test_gradients_behind_the_first_edit_are_the_same(tiny: HookedVLA) -> None:
    obs = make_observation(1)
    tape = Tape.record(tiny, obs, NOISE, [LATE])
    inputs, noise = tape.copies(1)
    with tape.resumed(1):
        _, cache = tiny.run_with_cache(inputs, [LATE], noise=noise, incl_bwd=True)
    _, expected = tiny.run_with_cache(obs, [LATE], noise=NOISE, incl_bwd=True)
    torch.testing.assert_close(cache[f"{LATE}_grad"] * 1, expected[f"{LATE}_grad"] * 1, rtol=1e-4, atol=1e-6)


def test_a_tape_refuses_what_it_is_not_of(tiny: HookedVLA) -> None:
    obs = make_observation(1)
    with pytest.raises(TypeError, match="noise is missing"):
        Tape.record(tiny, obs, None, [LATE])
    tape = Tape.record(tiny, make_observation(2), NOISE.repeat(2, 1, 1), [LATE])
    with pytest.raises(ValueError, match="3 lists of edits for an observation of 2 rows"):
        tape.run([[], [], []])
    with pytest.raises(ValueError, match="1 copies of the 2 rows"), tape.resumed(1):
        tiny(make_observation(2, seed=5), NOISE.repeat(2, 1, 1))
    tape = Tape.record(tiny, obs, NOISE, [LATE])
    for call in tape.calls:
        if call.kept and isinstance(call.output, Tensor):
            call.output.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place: record anew"):
        tape.run([[Ablate(LATE, "zero")]])
    assert not tiny.before_run
