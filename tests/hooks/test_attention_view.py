"""Views of attention: the figure shows the cached numbers, and CircuitsVis takes what the export gives."""

import html
import sys

import pytest
import torch
from circuitsvis.attention import attention_heads
from torch import Tensor

from hooked_vla import ActivationCache, HookedVLA, Observation

VLM = "vlm.blocks.0.attn.hook_pattern"
JOINT, CROSS = "expert.blocks.0.attn.hook_pattern", "expert.blocks.1.cross_attn.hook_pattern"


@pytest.fixture
def cache(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> ActivationCache:
    with torch.no_grad():
        return tiny_model.run_with_cache(observation, noise=noise)[1]


def test_the_figure_has_the_mean_and_every_head(cache: ActivationCache) -> None:
    figure = cache.attention(VLM, row=1)
    weights = cache[VLM][1]
    (heat,) = figure.data
    torch.testing.assert_close(torch.from_numpy(heat.z), weights.mean(0))
    buttons = figure.layout.updatemenus[0].buttons
    assert [button.label for button in buttons] == ["mean of heads", *(f"head {i}" for i in range(len(weights)))]
    torch.testing.assert_close(torch.tensor(buttons[2].args[0]["z"][0]), weights[1])
    assert heat.text[0][5] == "image:agent 0 reads image:wrist 1"
    named = [name for name, _, _ in cache.segments[cache.entries[VLM].streams["key"]].spans(1)]
    assert list(figure.layout.xaxis.ticktext) == named


def test_denoise_steps_are_chosen_and_the_last_shown(cache: ActivationCache) -> None:
    steps = cache.entries[JOINT].steps
    for step, wanted in ((None, steps[-1]), (0, 0)):
        heat = cache.attention(JOINT, step=step).data[0]
        torch.testing.assert_close(torch.from_numpy(heat.z), cache[JOINT][steps.index(wanted), 0].mean(0))
    assert heat.text[0][0] == "action 0 reads image:agent 0"


def test_circuitsvis_draws_every_layer(cache: ActivationCache) -> None:
    found = cache.circuitsvis("vlm.blocks.*.attn.hook_pattern", row=0)
    n = len(found.tokens)
    assert found.attention.shape == (len(found.sites), 4, n, n) and found.tokens[4] == "image:wrist 0"
    for layer, site in zip(found.attention, found.sites, strict=True):
        torch.testing.assert_close(layer, cache[site][0])
        drawn = str(attention_heads(attention=layer, tokens=found.tokens))
        assert "AttentionHeads" in drawn and "image:wrist 0" in drawn


def test_queries_that_are_no_keys_come_after_them(cache: ActivationCache) -> None:
    found = cache.circuitsvis(CROSS, step=1)
    weights = cache[CROSS][1, 0]
    _, n_queries, n_keys = weights.shape
    assert len(found.tokens) == n_queries + n_keys and found.tokens[-1] == f"action {n_queries - 1}"
    torch.testing.assert_close(found.attention[0, :, n_keys:, :n_keys], weights)
    assert found.attention.sum() == pytest.approx(float(weights.sum()), rel=1e-5)
    joint = cache.circuitsvis(JOINT)
    weights = cache[JOINT][-1, 0]
    # here the queries are the last of the keys
    assert len(joint.tokens) == weights.shape[2]
    torch.testing.assert_close(joint.attention[0, :, -weights.shape[1] :], weights)
    assert joint.attention[0, :, : -weights.shape[1]].sum() == 0


def test_mistakes_are_named(cache: ActivationCache, monkeypatch: pytest.MonkeyPatch) -> None:
    for call, error, said in (
        (lambda: cache.attention("vlm.blocks.0.hook_resid_pre"), ValueError, "is no attention pattern; nearest"),
        (lambda: cache.attention("vlm.blocks.9.attn.hook_pattern"), KeyError, "is not cached; nearest"),
        (lambda: cache.attention(VLM, row=2), IndexError, r"row 2: .* has rows 0\.\.1"),
        (lambda: cache.attention(VLM, step=0), ValueError, "runs once"),
        (lambda: cache.attention(JOINT, step=9), KeyError, r"denoise step 9 .* cached: \[0, 1, 2, 3\]"),
        (lambda: cache.circuitsvis([VLM, CROSS]), (ValueError, KeyError), "differ in tokens|runs once"),
        (lambda: cache.circuitsvis(VLM, tokens=["a"]), ValueError, "1 names for 39 tokens"),
    ):
        with pytest.raises(error, match=said):
            call()
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hooked-vla\[atlas\]'"):
        cache.attention(VLM)


def test_names_are_text(cache: ActivationCache) -> None:
    name = "<img src=x onerror=alert(1)>"
    stream = cache.entries[VLM].streams["key"]
    table = cache.segments[stream]
    object.__setattr__(table, "names", (f"image:{name}", *table.names[1:]))
    figure = cache.attention(VLM)
    assert name not in str(figure.data[0].text) and html.escape(name) in figure.data[0].text[0][0]
    assert name not in str(figure.layout.xaxis.ticktext)
