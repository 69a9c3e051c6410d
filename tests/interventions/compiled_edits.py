"""The compiled model under edits: one graph, eager's bits, and nothing compiled again when what edits hold changes.

Run by test_compiled_edits.py in a process of its own: the shape checks that tests switch on would break the graph.
"""

import logging
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from public_checkpoints import make_observation
from tolerance import assert_close
from torch._inductor import metrics

from hooked_vla import HookedVLA, registry
from hooked_vla.interventions import (
    Ablate,
    Add,
    AddRelative,
    Clamp,
    CutSetWarning,
    EditSet,
    Overwrite,
    Patch,
    ProjectOut,
    SAEFeatureEdit,
    SAEReconstruct,
    Scale,
    SubspacePatch,
)
from hooked_vla.interventions import compiled as compiled_module
from hooked_vla.interventions.compiled import CapturedGraph, _Constants
from hooked_vla.interventions.inductor import exact_options
from hooked_vla.sae.splice import SpliceSAE

VLM, EXPERT = "vlm.blocks.0.hook_resid_pre", "expert.blocks.0.hook_resid_post"
INSTRUCTIONS = ["put the red block on the tray", "lift"]


def smallest(n_steps: int) -> HookedVLA:
    """The tiny model at the smallest depth: compiling takes as long as there is to compile."""
    torch.set_num_threads(1)
    tiny = registry.get_spec("smolvla", "tiny")
    spec = replace(
        tiny,
        vision=replace(tiny.vision, n_layers=1),
        vlm=replace(tiny.vlm, n_layers=1),
        expert=replace(tiny.expert, decoder=replace(tiny.expert.decoder, n_layers=1), schedule=("joint",)),
        flow=replace(tiny.flow, n_steps=n_steps),
    )
    torch.manual_seed(0)
    return HookedVLA.from_network(spec, registry.build_network(spec)).requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> HookedVLA:
    return smallest(n_steps=2)


def inputs_of(model: HookedVLA, instructions: list[str], seed: int):
    inputs = model.prepare(make_observation(seed=seed, instruction=instructions))
    return replace(inputs, features=model.net.vision_features(inputs), images=None)


def make_edits(model: HookedVLA) -> EditSet:
    """One of every operator that has tensors of its own, at one site or another."""
    d, d_expert = model.hook_points[VLM].shape[-1], model.hook_points[EXPERT].shape[-1]
    torch.manual_seed(1)
    w_enc, w_dec = torch.randn(2, 16, d) * d**-0.5
    sae = SpliceSAE(w_enc, torch.zeros(16), w_dec, torch.zeros(d), threshold=torch.zeros(16))
    return EditSet(
        model,
        [
            Add(VLM, torch.randn(d), 1.0, tokens="language", env=range(10), name="steer"),
            SAEFeatureEdit(VLM, sae, [1, 2], scale=2.0, name="feature"),
            Scale(VLM, 1.5, rows=0, name="scale"),
            Patch(EXPERT, torch.randn(2, 2, 8, d_expert), strength=0.5, denoise=1, name="patch"),
            ProjectOut(EXPERT, torch.randn(3, d_expert), 0.5, denoise=0, name="out"),
        ],
    )


def run_changes(model: HookedVLA, edits: EditSet, after_each=lambda: None) -> dict[str, torch.Tensor]:
    """What changed -> actions, one call after the other."""
    first, second = inputs_of(model, INSTRUCTIONS, 0), inputs_of(model, INSTRUCTIONS[::-1], 1)
    noise = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    d, d_expert = model.hook_points[VLM].shape[-1], model.hook_points[EXPERT].shape[-1]
    changes = {
        "nothing": lambda: None,
        "strength": lambda: edits.set("steer", strength=-2.0),
        "direction": lambda: edits.set("steer", direction=torch.linspace(-1, 1, d)),
        "tokens": lambda: edits.set("steer", tokens=["image:*", "state"]),
        "source": lambda: edits.set("patch", source=torch.ones(2, 2, 8, d_expert), strength=1.0),
        "features": lambda: edits.set("feature", features=[5, 3], shift=1.0),
        "basis": lambda: edits.set("out", basis=torch.eye(3, d_expert), strength=1.0),
        "rows": lambda: edits.set("scale", rows=1),
        "environment step": lambda: setattr(model.run_state, "env_step", 10),
        "inputs": lambda: None,
    }
    found = {}
    model.run_state.env_step = 0
    with model.edits(edits):
        for name, change in changes.items():
            change()
            inputs, draws = (second, noise[1]) if name == "inputs" else (first, noise[0])
            found[name] = model.sample_actions(inputs, draws)
            after_each()
    model.run_state.env_step = None
    return found


def test_one_compilation_has_eagers_bits_whatever_is_set(model: HookedVLA, caplog) -> None:
    """As users get it: Inductor fuses, and this model does not fall back to unfused code."""
    metrics.reset()
    caplog.set_level(logging.WARNING)
    eager = run_changes(model, make_edits(model))
    before = eager["nothing"]
    for name, actions in eager.items():
        assert name == "nothing" or not torch.equal(actions, before), f"{name} changes nothing: it proves nothing"
        before = actions
    with model.compile("exact") as handle:
        counts = []
        compiled = run_changes(model, make_edits(model), lambda: counts.append(handle.n_compilations))
        assert [name for name in eager if not torch.equal(compiled[name], eager[name])] == []
        assert set(counts) == {1} and handle.n_fallbacks == 0
        assert metrics.generated_kernel_count > 0 and "without fusion" not in caplog.text
        # in a second run of the same changes nothing is left to compile, and other hooks are not compiled
        with model.hooks([(EXPERT, lambda value, hook: value * 2)]):
            run_changes(model, make_edits(model), lambda: counts.append(handle.n_compilations))
        assert set(counts) == {1}
    assert model._compiled is None


def test_inductor_fuses_the_whole_model_as_it_likes() -> None:
    """With other last bits; there is one denoise step less to compile."""
    model = smallest(n_steps=1)
    inputs, noise = inputs_of(model, INSTRUCTIONS, 0), torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    d = model.hook_points[VLM].shape[-1]
    edits = EditSet(model, [Add(VLM, torch.ones(d), 1.0, tokens="language", name="steer"), Scale(EXPERT, 1.5, rows=0)])

    def run() -> list[torch.Tensor]:
        found = []
        with model.edits(edits):
            for strength in (1.0, -2.0):
                edits.set("steer", strength=strength)
                found.append(model.sample_actions(inputs, noise))
        return found

    eager = run()
    metrics.reset()
    with model.compile("fused") as handle:
        compiled = run()
        assert (handle.n_compilations, handle.n_fallbacks) == (1, 0)
    assert metrics.generated_kernel_count > 0 and not torch.equal(eager[0], eager[1])
    for mine, right in zip(compiled, eager, strict=True):
        assert_close(mine, right)


def every_other_kind(model: HookedVLA) -> EditSet:
    """What `make_edits` has not: each kind, and each way of an autoencoder, at sites of both streams."""
    d, d_expert = model.hook_points[VLM].shape[-1], model.hook_points[EXPERT].shape[-1]
    torch.manual_seed(1)

    def sae(width: int, m: int = 16, **gate) -> SpliceSAE:
        w_enc, w_dec = torch.randn(2, m, width) * width**-0.5
        return SpliceSAE(w_enc, torch.zeros(m), w_dec, torch.zeros(width), **gate)

    zero, topk = sae(d, 80, threshold=torch.zeros(80)), sae(d_expert, k=4)
    return EditSet(
        model,
        [
            AddRelative(VLM, torch.randn(d), 0.5, tokens="language", name="relative"),
            Clamp(VLM, -2.0, 2.0, name="clamp"),
            SubspacePatch(VLM, torch.randn(d), torch.randn(3, d), 0.5, name="subspace"),
            SAEFeatureEdit(VLM, zero, range(70), scale=0.5, name="many features"),
            SAEFeatureEdit(VLM, zero, 3, shift=1.0, tokens="language", pool="segment", name="pooled"),
            Ablate(EXPERT, "zero", channels=[0, 5], name="zero"),
            Ablate(EXPERT, "mean", torch.randn(d_expert), rows=0, positions=1, name="mean"),
            Ablate(EXPERT, "resample", torch.randn(9, d_expert), positions=2, seed=3, name="resample"),
            Overwrite(EXPERT, 0.25, channels=2, name="overwrite"),
            SAEFeatureEdit(EXPERT, topk, [1, 2], scale=3.0, shift=0.5, name="top k"),
            SAEFeatureEdit(EXPERT, topk, 5, shift=1.0, keep_error=False, rows=1, name="without error"),
            SAEReconstruct(EXPERT, topk, positions=4, name="reconstruct"),
        ],
    )


def test_every_kind_of_edit_is_traced_into_one_graph(model: HookedVLA, monkeypatch) -> None:
    """By PyTorch's tracer, which then runs eager's kernels: bits are the same, and `set` traces nothing again."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda fn, fullgraph, dynamic, options: compile_(
            fn, fullgraph=fullgraph, dynamic=dynamic, backend="eager"
        ),
    )  # fmt: skip
    inputs, noise = inputs_of(model, INSTRUCTIONS, 0), torch.randn(2, 8, 8)
    changes = {
        "relative": {"strength": 1.0}, "clamp": {"high": 0.5}, "subspace": {"source": torch.ones(64)},
        "many features": {"features": range(5, 75)}, "pooled": {"shift": -2.0},
        "mean": {"source": torch.zeros(48)}, "resample": {"seed": 4}, "overwrite": {"value": -3.0},
        "top k": {"features": [7, 2]}, "without error": {"low": 2.0}, "reconstruct": {"positions": 6},
    }  # fmt: skip
    assert model.hook_points[VLM].shape[-1] == 64 and model.hook_points[EXPERT].shape[-1] == 48

    def run(after_each) -> dict[str, torch.Tensor]:
        edits = every_other_kind(model)
        with model.edits(edits):
            found = {"nothing": model.sample_actions(inputs, noise)}
            for name, change in changes.items():
                edits.set(name, **change)
                found[name] = model.sample_actions(inputs, noise)
                after_each()
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutSetWarning)
        eager = run(lambda: None)
        counts: list[int] = []
        with model.compile("exact") as handle:
            traced = run(lambda: counts.append(handle.n_compilations))
    assert [name for name in eager if not torch.equal(traced[name], eager[name])] == []
    assert set(counts) == {1}


def test_constants_of_a_graph_are_those_of_the_warm_up() -> None:
    """Tensors made of numbers on another device are made while recording, and given back in order afterwards."""
    constants = _Constants()

    def run() -> list[torch.Tensor]:
        return [torch.tensor(2.0, device="meta"), torch.tensor([1, 2], device="meta"), torch.tensor(3.0)]

    with constants.recording():
        run()
    with constants.recording():
        first = run()
    with constants.replaying():
        again = run()
    assert again[0] is first[0] and again[1] is first[1] and again[2] is not first[2]
    assert [tuple(each.shape) for each in constants.made] == [(), (2,)]


class ReplayedGraph:
    """A CUDA graph as far as bookkeeping sees it: what ran in `recording` runs again, into the same result."""

    work = staticmethod(lambda: None)

    def replay(self) -> None:
        self.work()


@pytest.fixture
def graphs_on_a_cpu(monkeypatch) -> None:
    class Stream:
        def __init__(self, device=None) -> None:
            pass

        def wait_stream(self, other) -> None:
            pass

    @contextmanager
    def nothing(*_):
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    monkeypatch.setattr(torch.cuda, "graph", nothing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", ReplayedGraph)


class CapturedOnCpu(CapturedGraph):
    """With a stand-in for the graph, which runs the model again; all else is what a GPU's has."""

    def __init__(self, sample, inputs, draws, kept) -> None:
        super().__init__(sample, inputs, draws, kept)
        self.graph.work = lambda: self.actions.copy_(sample(self.inputs, self.draws))


@pytest.mark.usefixtures("graphs_on_a_cpu")
def test_a_captured_graph_reads_new_inputs_and_edits(model: HookedVLA, monkeypatch) -> None:
    make = lambda self, *given: CapturedOnCpu(self._sample, *given)  # noqa: E731
    monkeypatch.setattr(compiled_module.Compiled, "_make", make)
    eager = run_changes(model, make_edits(model))
    kept = []
    with model.compile("exact") as handle:
        captured = run_changes(model, make_edits(model), lambda: kept.append(next(iter(handle._runs.values()))))
        assert handle.n_compilations == 1 and len({id(run) for run in kept}) == 1
    # what was returned before is not written over by later replays
    assert [name for name in eager if not torch.equal(captured[name], eager[name])] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_captured_graph_follows_what_is_set() -> None:
    """On a GPU: every change of `run_changes` in one captured graph, equal to eager up to rounding."""
    model = smallest(n_steps=2).to("cuda")
    eager = run_changes(model, make_edits(model))
    with model.compile("exact") as handle:
        captured = run_changes(model, make_edits(model))
        assert handle.n_compilations == 1
        assert all(isinstance(run, CapturedGraph) for run in handle._runs.values())
    for name, right in eager.items():
        assert_close(captured[name], right)


def test_a_model_that_does_not_compile_says_so(model: HookedVLA) -> None:
    inputs, noise = inputs_of(model, INSTRUCTIONS, 0), torch.randn(2, 8, 8)

    def until_the_end(inputs, draws) -> torch.Tensor:
        while bool((draws[0].sum() > 0).all()):
            draws = [draws[0] - 1]
        return draws[0]

    run = compiled_module.InductorRun(until_the_end, exact=False, kept=None)
    with pytest.raises(RuntimeError, match="this model does not compile as one graph: what it computes next depends"):
        run(inputs, [noise])


def test_exact_options_fuse_and_keep_eagers_bits() -> None:
    """Of norms, rotations, softmax and the like, in both dtypes."""
    torch.manual_seed(0)
    x, w, angle = torch.randn(2, 5, 24), torch.randn(24, 24), torch.randn(5, 12)

    def layer(x: torch.Tensor) -> torch.Tensor:
        first, second = (x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * 1.7).chunk(2, dim=-1)
        sin, cos = angle.sin().to(x.dtype), angle.cos().to(x.dtype)
        y = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1) @ w.to(x.dtype)
        y = torch.where(y > 0, y, torch.nn.functional.gelu(y)) + x.softmax(-1) * 0.3
        return y.transpose(0, 1) / 3 + x.transpose(0, 1)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        return layer(x), layer(x.bfloat16())

    # precompiled headers pay for more code than there is here
    options = exact_options() | {"cpp_cache_precompile_headers": False}
    metrics.reset()
    with torch.no_grad():
        compiled = torch.compile(both, fullgraph=True, dynamic=False, options=options)()
        assert all(torch.equal(*pair) for pair in zip(compiled, both(), strict=True))
    assert metrics.generated_kernel_count > 0


def test_modes_are_checked(model: HookedVLA) -> None:
    with pytest.raises(ValueError, match="mode must be one of exact, fused, got 'fast'"):
        model.compile("fast")
    assert model._compiled is None


def test_what_gradients_are_wanted_of_runs_uncompiled(model: HookedVLA, caplog) -> None:
    inputs, noise = inputs_of(model, INSTRUCTIONS, 0), torch.randn(2, 8, 8)
    parameter = next(model.net.expert.parameters()).requires_grad_()
    try:
        with model.compile("exact") as handle, caplog.at_level(logging.WARNING):
            model.sample_actions(inputs, noise).sum().backward()
        assert parameter.grad is not None and handle.n_compilations == 0
        assert "the compiled model runs uncompiled, because gradients are recorded" in caplog.text
    finally:
        parameter.requires_grad_(False).grad = None


def test_a_compilation_with_other_bits_is_not_used(model: HookedVLA, monkeypatch, caplog) -> None:
    """Where fusion changes bits after all, Inductor is asked again without; where that does not help, nobody is."""
    inputs, noise = inputs_of(model, INSTRUCTIONS, 0), torch.randn(2, 8, 8)
    expected, asked, wrong = model.sample_actions(inputs, noise), [], 1

    def compile_(sample, fullgraph: bool, dynamic: bool, options: dict):
        asked.append(options)
        return lambda *args: sample(*args) * (1 + 1e-6) if len(asked) <= wrong else sample(*args)

    monkeypatch.setattr(torch, "compile", compile_)
    with caplog.at_level(logging.WARNING), model.compile("exact"):
        actions = [model.sample_actions(inputs, noise) for _ in range(2)]
    assert all(torch.equal(each, expected) for each in actions)
    assert [each == exact_options() for each in asked] == [True, False]
    assert "compiling again without fusion" in caplog.text
    asked.clear()
    wrong = 2
    with model.compile("exact"), pytest.raises(RuntimeError, match="computes other bits than the model"):
        model.sample_actions(inputs, noise)
