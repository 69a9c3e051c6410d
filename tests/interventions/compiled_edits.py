"""The compiled model under edits: one graph, eager's bits, and nothing compiled again when what edits hold changes.

Run by test_compiled_edits.py in a process of its own: the shape checks that tests switch on would break the graph.
"""

import logging
from dataclasses import replace

import pytest
import torch
from conftest import make_observation
from torch._inductor import metrics

from hooked_vla import HookedVLA, registry
from hooked_vla.interventions import Add, EditSet, Patch, ProjectOut, SAEFeatureEdit, Scale
from hooked_vla.interventions import compiled as compiled_module
from hooked_vla.interventions.inductor import exact_options, unfused_options
from hooked_vla.sae.splice import SpliceSAE

VLM, EXPERT = "vlm.blocks.0.hook_resid_pre", "expert.blocks.0.hook_resid_post"
INSTRUCTIONS = ["put the red block on the tray", "lift"]


@pytest.fixture(scope="module")
def model() -> HookedVLA:
    """The tiny model at the smallest depth: compiling takes as long as there is to compile."""
    torch.set_num_threads(1)
    tiny = registry.get_spec("smolvla", "tiny")
    spec = replace(
        tiny,
        vision=replace(tiny.vision, n_layers=1),
        vlm=replace(tiny.vlm, n_layers=1),
        expert=replace(tiny.expert, decoder=replace(tiny.expert.decoder, n_layers=1), schedule=("joint",)),
        flow=replace(tiny.flow, n_steps=2),
    )
    torch.manual_seed(0)
    return HookedVLA.from_network(spec, registry.build_network(spec)).requires_grad_(False)


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


def test_one_compilation_has_eagers_bits_whatever_is_set(model: HookedVLA, monkeypatch) -> None:
    # the C++ of what is fused takes several times as long to compile as all the rest
    monkeypatch.setattr(compiled_module, "exact_options", unfused_options)
    eager = run_changes(model, make_edits(model))
    before = eager["nothing"]
    for name, actions in eager.items():
        assert name == "nothing" or not torch.equal(actions, before), f"{name} changes nothing: it proves nothing"
        before = actions
    with model.compile("exact") as handle:
        counts = []
        compiled = run_changes(model, make_edits(model), lambda: counts.append(handle.n_compilations))
        assert [name for name in eager if not torch.equal(compiled[name], eager[name])] == []
        assert set(counts) == {1}
        # in a second run of the same changes nothing is left to compile, and other hooks are not compiled
        with model.hooks([(EXPERT, lambda value, hook: value * 2)]):
            run_changes(model, make_edits(model), lambda: counts.append(handle.n_compilations))
        assert set(counts) == {1}
    assert model._compiled is None


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
