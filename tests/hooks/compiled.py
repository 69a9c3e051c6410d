"""The hooked forward compiles as one graph, with no hooks and with an edit, and computes what eager computes.

Run by test_compile.py in a process of its own: the shape checks that tests switch on would break the graph.
"""

from dataclasses import replace

import pytest
import torch
from public_checkpoints import make_observation
from tolerance import assert_close

from hooked_vla import HookedVLA, registry


@pytest.fixture(scope="module")
def model() -> HookedVLA:
    """The tiny model at the smallest depth that has every kind of layer: tracing time goes with depth × steps."""
    tiny = registry.get_spec("smolvla", "tiny")
    spec = replace(
        tiny,
        vision=replace(tiny.vision, n_layers=1),
        vlm=replace(tiny.vlm, n_layers=2),
        expert=replace(tiny.expert, decoder=replace(tiny.expert.decoder, n_layers=2), schedule=("joint", "cross")),
        flow=replace(tiny.flow, n_steps=2),
    )
    torch.manual_seed(0)
    return HookedVLA.from_network(spec, registry.build_network(spec)).requires_grad_(False)


SITES = ["expert.blocks.1.hook_resid_post", "vlm.blocks.0.attn.hook_v", "expert.blocks.0.attn.hook_pattern"]


def test_one_graph_equals_eager_and_goes_with_its_edits(model: HookedVLA) -> None:
    """Removing hooks recompiles rather than leaving the edits in the graph."""
    inputs = model.prepare(make_observation())
    noise = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model.sample_actions, fullgraph=True, backend="aot_eager")
    edits = [(site, lambda value, hook: value * 1.5 if hook.denoise_step != 1 else None) for site in SITES]
    plain = model.sample_actions(inputs, noise)
    for edit in edits:
        with model.hooks([edit]):
            assert not torch.equal(model.sample_actions(inputs, noise), plain), edit[0]
    with model.hooks(edits):
        assert_close(compiled(inputs, noise), model.sample_actions(inputs, noise))
    assert_close(compiled(inputs, noise), plain)
