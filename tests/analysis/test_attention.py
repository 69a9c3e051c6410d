"""Attention to cameras: planted patterns come out where they were planted, and scores are 1 at chance."""

import numpy as np
import pytest
import torch
from matplotlib.colors import Normalize

from hooked_vla import HookedVLA, Observation
from hooked_vla.analysis.attention import (
    attention_shares,
    camera_attention,
    camera_views,
    heads_of,
    knock_out,
    pattern_sites,
    pointing_chance,
    pointing_hit,
    pointing_score,
    token_locality,
    word_positions,
)
from hooked_vla.analysis.attention_figures import around_one, draw_overlay, overlay, to_bytes

VLM, CROSS = "vlm.blocks.0.attn.hook_pattern", "expert.blocks.1.cross_attn.hook_pattern"


@pytest.fixture
def cached(tiny_model, observation, noise):
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(observation, "*.hook_pattern", noise)
    return cache


@pytest.fixture
def views(tiny_model, observation):
    return camera_views(tiny_model, observation)


def _plant(view, cell, queries):
    """A hook that makes the asked queries of every head look at one cell of a camera, and nowhere else."""

    def plant(pattern, hook):
        new = torch.zeros_like(pattern)
        for row, at in enumerate(hook.key_segments.positions(view.segment)):
            asking = hook.segments.positions(queries)[row]
            new[row, :, asking, at[view.n_before + cell]] = 1
        return new

    return plant


@pytest.mark.parametrize(("site", "queries"), [(VLM, "language"), (CROSS, "action")])
@pytest.mark.parametrize("cell", [0, 2, 3])
def test_a_planted_pattern_comes_out_at_its_cell(tiny_model, observation, noise, views, site, queries, cell):
    view = views["wrist"]
    with torch.no_grad(), tiny_model.hooks([(site, _plant(view, cell, queries))]):
        _, cache = tiny_model.run_with_cache(observation, site, noise)
    seen = camera_attention(cache, site, view, queries)
    expected = torch.zeros(view.grid).flatten()
    expected[cell] = 1
    steps = tiny_model.n_denoise_steps if site == CROSS else 1
    assert seen.weights.shape == (2, steps, 4, *view.grid)
    assert (seen.weights == expected.reshape(view.grid)).all() and (seen.share == 1).all()
    other = camera_attention(cache, site, views["agent"], queries)
    assert (other.weights == 0).all()


def test_shares_of_all_that_is_read_add_up_to_one(cached, views):
    pattern = cached[VLM]
    asked = camera_attention(cached, VLM, views["agent"], "language")
    for row, at in enumerate(cached.segments["vlm"].positions("language")):
        keys = cached.segments["vlm"].positions("image:agent")[row]
        expected = pattern[row][:, at][..., keys].mean(1).reshape(4, *views["agent"].grid)
        torch.testing.assert_close(asked.weights[row, 0], expected)


@pytest.mark.parametrize(("site", "queries"), [(VLM, "language"), (VLM, None), (CROSS, "action")])
def test_every_segments_share_is_told(cached, views, site, queries):
    shares = attention_shares(cached, site, queries)
    whole = sum(shares.values())
    torch.testing.assert_close(whole, torch.ones_like(whole))
    for name, view in views.items():
        seen = camera_attention(cached, site, view, queries)
        torch.testing.assert_close(shares[f"image:{name}"], seen.share)
    assert {"language", "state"} <= set(shares)


def test_relative_to_uniform_is_one_for_uniform_attention(tiny_model, observation, noise, views):
    def even(scores, hook):
        return torch.where(scores > -1e30, 0.0, scores)

    with torch.no_grad(), tiny_model.hooks([("*.hook_attn_scores", even)]):
        _, cache = tiny_model.run_with_cache(observation, "*.hook_pattern", noise)
    for site, queries in ((VLM, "language"), (CROSS, "action"), ("expert.blocks.0.attn.hook_pattern", "action")):
        relative = camera_attention(cache, site, views["agent"], queries).relative
        torch.testing.assert_close(relative, torch.ones_like(relative))


def test_inside_the_tower_every_image_is_a_row(tiny_model, observation, cached):
    views = camera_views(tiny_model, observation, tower=True)
    site = "vision.blocks.0.attn.hook_pattern"
    for i, view in enumerate(views.values()):
        seen = camera_attention(cached, site, view)
        assert seen.weights.shape[0] == 2
        # rows of the tower: all cameras of the first row, then those of the second
        pattern = cached[site]
        expected = pattern[i :: len(pattern) // 2].mean(2).reshape(2, -1, *view.grid)
        torch.testing.assert_close(seen.weights[:, 0], expected)
        torch.testing.assert_close(seen.share, torch.ones_like(seen.share))


def test_queries_may_be_words(tiny_model, views):
    images = {each: np.zeros((48, 80, 3), np.uint8) for each in ("agent", "wrist")}
    obs = Observation(images, np.zeros(4, np.float32), "ab")
    inputs = tiny_model.prepare(obs)
    segments = tiny_model.segments(inputs)["vlm"]
    # the tiny tokenizer has one token a byte
    (at,) = word_positions(tiny_model, inputs, [["b"]])
    language = segments.positions("language")[0]
    assert at.tolist() == [int(language[1])]
    _, cache = tiny_model.run_with_cache(obs, VLM)
    seen = camera_attention(cache, VLM, views["agent"], [at])
    keys = segments.positions("image:agent")[0]
    torch.testing.assert_close(seen.weights[0, 0].flatten(1), cache[VLM][0][:, at[0], keys])
    with pytest.raises(ValueError, match=r"row 0: none of \['q'\] among the tokens \['a', 'b'"):
        word_positions(tiny_model, inputs, [["q"]])


def test_what_cannot_be_mapped_is_named(cached, views, tiny_model):
    with pytest.raises(ValueError, match=r"hook_z is no attention pattern; nearest: .*hook_pattern"):
        camera_attention(cached, "vlm.blocks.0.attn.hook_z", views["agent"])
    with pytest.raises(KeyError, match="no token segment 'words'"):
        camera_attention(cached, VLM, views["agent"], "words")
    with pytest.raises(ValueError, match="is inside the vision tower, whose patches all ask"):
        camera_attention(cached, "vision.blocks.0.attn.hook_pattern", views["agent"], "language")
    with pytest.raises(ValueError, match="2 rows, but queries are given for 1"):
        camera_attention(cached, VLM, views["agent"], [torch.tensor([0])])
    with pytest.raises(ValueError, match=r"pathway 'head'; pathways with any: \['vision', 'vlm', 'expert'\]"):
        pattern_sites(tiny_model, "head")


def test_dead_patterns_are_left_out_unless_asked_for(tiny_model):
    live, every = pattern_sites(tiny_model, "vlm"), pattern_sites(tiny_model, "vlm", only_live=False)
    assert every[:-1] == live and not tiny_model.hook_points[every[-1]].reaches_action
    assert heads_of(tiny_model, live[:1]) == [(live[0], head) for head in range(4)]


def test_windows_are_refused():
    model = HookedVLA.from_spec("xvla", size="tiny", seed=0)
    obs = Observation(
        {each: np.zeros((64, 64, 3), np.uint8) for each in ("agent", "wrist")}, np.zeros(20, np.float32), "push"
    )
    sites = ["vision.stages.0.blocks.0.spatial.attn.hook_pattern", "vision.stages.0.blocks.0.channel.attn.hook_pattern"]
    with torch.no_grad():
        _, cache = model.run_with_cache(obs, [*sites, VLM])
    view = camera_views(model, obs)["agent"]
    for site in sites:
        with pytest.raises(ValueError, match="is not attention between the tokens of whole images"):
            camera_attention(cache, site, view)
    seen = camera_attention(cache, VLM, view, "language")
    # a pooled token has attention, but no place
    assert (seen.before > 0).all() and seen.weights.shape[-2:] == view.grid


class TestPointing:
    @pytest.fixture
    def view(self, views):
        return views["agent"]

    def test_uniform_attention_is_at_chance(self, view):
        for seed in range(3):
            mask = np.random.default_rng(seed).random(view.seen.shape) < 0.1
            # as much attention for every pixel that is seen: cells that are partly padding get less
            weights = torch.from_numpy(view.counts(np.ones_like(mask)).astype(float))
            assert float(pointing_score(weights, view, mask)) == pytest.approx(1)

    def test_all_attention_on_the_mask_scores_its_inverse_area(self, view):
        top, bottom, left, right = view.box(1, 1)
        mask = np.zeros(view.seen.shape, bool)
        mask[top:bottom, left:right] = True
        weights = torch.zeros(2, *view.grid)
        weights[0, 1, 1], weights[1, 1, 0] = 0.3, 0.3
        score = pointing_score(weights, view, mask)
        assert score.tolist() == pytest.approx([mask.size / mask.sum(), 0])
        assert pointing_hit(weights, view, mask).tolist() == [True, False]
        assert pointing_chance(view, mask) == pytest.approx(1 / (view.counts(np.ones_like(mask)) > 0).sum())

    def test_attention_to_padding_counts_for_nothing(self, tiny_model, observation):
        view = camera_views(tiny_model, observation, tower=True)["agent"]
        empty = view.counts(np.ones(view.seen.shape, bool)) == 0
        assert empty.any()
        mask = np.zeros(view.seen.shape, bool)
        mask[-8:, -8:] = True
        weights = torch.ones(view.grid)
        loud = weights.masked_fill(torch.from_numpy(empty), 100.0)
        assert float(pointing_score(loud, view, mask)) == float(pointing_score(weights, view, mask))

    def test_an_empty_mask_is_an_error(self, view):
        with pytest.raises(ValueError, match="the mask has 0 pixels, none of which the model sees"):
            pointing_score(torch.ones(view.grid), view, np.zeros(view.seen.shape, bool))


def test_a_knocked_out_head_writes_nothing(tiny_model, observation, noise):
    edit = knock_out(VLM, 2)
    assert edit.site == "vlm.blocks.0.attn.hook_z"
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(observation, edit.site, noise, edits=[edit])
        _, clean = tiny_model.run_with_cache(observation, edit.site, noise)
    value, before = cache[edit.site], clean[edit.site]
    assert (value[:, :, 2] == 0).all() and (before[:, :, 2] != 0).any()
    assert torch.equal(value[:, :, [0, 1, 3]], before[:, :, [0, 1, 3]])
    with pytest.raises(ValueError, match="hook_z or by their hook_pattern, got 'vlm.blocks.0.hook_attn_out'"):
        knock_out("vlm.blocks.0.hook_attn_out", 0)


def test_tokens_of_a_tower_without_attention_are_local(tiny_model, observation):
    obs = Observation(
        {name: np.asarray(image[0]) for name, image in observation.images.items()}, observation.state[0], "push"
    )
    # images that fill the model's: a cell without pixels would not count
    obs = Observation({name: image[:, :48] for name, image in obs.images.items()}, obs.state, "push")
    model = HookedVLA.from_spec("smolvla", size="tiny", seed=1)
    view = camera_views(model, obs)["agent"]
    for block in model.net.vision.blocks:
        torch.nn.init.zeros_(block.attn.o_proj.weight)
        torch.nn.init.zeros_(block.attn.o_proj.bias)
    assert token_locality(model, obs, view).all()
    # a tower that hands every token its neighbour's features
    with model.hooks([("connector.hook_out", lambda value, hook: value.roll(1, dims=1))]):
        assert not token_locality(model, obs, view).any()


def test_the_overlay_colours_the_cells_pixels_and_no_others(views):
    view = views["agent"]
    image = np.full((*view.seen.shape, 3), 128, np.uint8)
    grid = np.zeros(view.grid)
    grid[1, 0] = 1.0
    picture = overlay(image, grid, view, Normalize(0, 1))
    top, bottom, left, right = view.box(1, 0)
    inside = np.zeros(view.seen.shape, bool)
    inside[top:bottom, left:right] = True
    red, blue = picture[..., 0], picture[..., 2]
    assert (red[inside] > blue[inside]).all() and (red[~inside] < blue[~inside]).all()
    assert to_bytes(picture, scale=2).shape == (96, 160, 3)
    with pytest.raises(ValueError, match="the view is of"):
        overlay(image[:-1], grid, view, Normalize(0, 1))


def test_a_drawn_overlay_writes_each_cells_number(views):
    from matplotlib.figure import Figure

    view = views["agent"]
    grid = np.array([[0.5, 1.0], [1.5, 2.0]])
    axes = Figure().subplots()
    image = np.full((*view.seen.shape, 3), 128, np.uint8)
    draw_overlay(axes, image, grid, view, around_one([grid]), [(image[..., 0] > 0, "black")])
    for text in axes.texts:
        x, y = text.get_position()
        cell = grid[view.row_of[int(y)], view.column_of[int(x)]]
        assert text.get_text() == f"{cell:.2f}"
    assert len(axes.texts) == 4
