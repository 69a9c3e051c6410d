"""Overwritten neurons hold the constant in every token and step; controls are of the same size and elsewhere."""

import pandas as pd
import pytest
import torch
from public_checkpoints import make_observation

from hooked_vla.analysis.neurons import Neurons, activation_scales, contrast_neurons

FIRST, SECOND = "vlm.blocks.0.mlp.hook_post", "vlm.blocks.1.mlp.hook_post"


def test_overwriting_holds_neurons_at_the_constant_and_no_others(tiny_model, observation, noise):
    chosen = Neurons({FIRST: (7, 2), SECOND: (0,)})
    assert len(chosen) == 3 and chosen.at[FIRST] == (2, 7)
    with torch.no_grad():
        _, clean = tiny_model.run_with_cache(observation, [FIRST, SECOND], noise)
        actions, cache = tiny_model.run_with_cache(observation, [FIRST, SECOND], noise, edits=chosen.overwrite(4.0))
        plain = tiny_model(observation, noise)
    assert (cache[FIRST][..., [2, 7]] == 4).all() and (cache[SECOND][..., 0] == 4).all()
    others = [i for i in range(cache[FIRST].shape[-1]) if i not in (2, 7)]
    assert torch.equal(cache[FIRST][..., others], clean[FIRST][..., others])
    assert not torch.equal(actions.chunk, plain.chunk)


def test_edits_can_be_limited_to_tokens(tiny_model, observation, noise):
    edits = Neurons({FIRST: (1,)}).overwrite(-3.0, tokens="language")
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(observation, FIRST, noise, edits=edits)
    language = cache.segments["vlm"].mask("language")
    assert (cache[FIRST][..., 1][language] == -3).all() and (cache[FIRST][..., 1][~language] != -3).all()


def test_random_controls_are_as_many_others_and_seeded(tiny_model):
    chosen = Neurons({FIRST: (1, 3, 5), SECOND: (0,)})
    drawn = [chosen.random(tiny_model, seed) for seed in (0, 0, 1)]
    assert drawn[0].at == drawn[1].at != drawn[2].at
    for each in drawn:
        assert {site: len(n) for site, n in each.at.items()} == {FIRST: 3, SECOND: 1}
        assert not set(each.at[FIRST]) & {1, 3, 5} and not set(each.at[SECOND]) & {0}
    width = tiny_model.hook_points[FIRST].shape[-1]
    with pytest.raises(ValueError, match=f"{FIRST} has {width} neurons"):
        Neurons({FIRST: tuple(range(width - 1))}).random(tiny_model, 0)


def test_neurons_come_from_tables():
    table = pd.DataFrame({"site": [FIRST, SECOND, FIRST], "neuron": [4, 1, 4], "word": ["a", "b", "c"]})
    assert Neurons.of_table(table).at == {FIRST: (4,), SECOND: (1,)}
    with pytest.raises(ValueError, match="no neurons"):
        Neurons.of_table(table.iloc[:0])
    with pytest.raises(ValueError, match=r"got \['vlm.blocks.0.hook_mlp_out'\]"):
        Neurons({"vlm.blocks.0.hook_mlp_out": (1,)})


def test_scales_are_those_of_tokens_that_are_not_padding(tiny_model, observation, noise):
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(observation, FIRST, noise)
    valid = ~cache.segments["vlm"].mask("pad")
    values = cache[FIRST][valid].abs()
    scale = activation_scales(tiny_model, observation, [FIRST], noise)[FIRST]
    assert scale.largest == float(values.max())
    assert scale.rms == pytest.approx(float(values.square().mean().sqrt()), rel=1e-5)
    assert scale.high == pytest.approx(float(values.flatten().quantile(0.99)), rel=1e-5)
    assert not any(point.listeners for point in tiny_model.points.values())


def test_neurons_that_differ_between_prompts_are_found(tiny_model):
    pair = [make_observation(2, seed=0, instruction=texts) for texts in (["go up", "go up"], ["go on", "go on"])]
    noise = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    table = contrast_neurons(tiny_model, *pair, [FIRST, SECOND], noise)
    means = []
    for obs in pair:
        with torch.no_grad():
            _, cache = tiny_model.run_with_cache(obs, [FIRST, SECOND], noise)
        valid = ~cache.segments["vlm"].mask("pad")
        means.append({site: torch.stack([v[m].mean(0) for v, m in zip(cache[site], valid, strict=True)])
                      for site in (FIRST, SECOND)})  # fmt: skip
    best = table.iloc[0]
    change = means[0][best["site"]] - means[1][best["site"]]
    spread = torch.cat([means[0][best["site"]], means[1][best["site"]]]).std()
    assert best["difference"] == pytest.approx(float(change.mean(0)[best["neuron"]]), rel=1e-4)
    assert best["strength"] == pytest.approx(float((change.mean(0) / spread).max()), rel=1e-4)
    assert table["strength"].is_monotonic_decreasing and best["strength"] > 0 > table.iloc[-1]["strength"]
    with pytest.raises(ValueError, match="rows must be pairs, two or more: got 2 and 1"):
        contrast_neurons(tiny_model, pair[0], make_observation(1), [FIRST])
