"""Rows and their ids: for every model and site, a row is what a cache of the same run has at the place of its ids."""

from collections import Counter

import pytest
import torch
from public_checkpoints import read_golden
from tolerance import assert_close
from unchecked import unchecked_shapes

from hooked_vla import HookedVLA, list_models
from hooked_vla.hooks.names import is_denoised
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import PAD
from hooked_vla.sae.rows import IDS, NONE, Capture, Names, RowTaker, describe, id_numbers, previous_rows, site_groups

EPISODES = [7, 3, 11, 2]
RESID, EXPERT, VISION = (
    "vlm.blocks.*.hook_resid_post",
    "expert.blocks.0.hook_resid_post",
    "vision.blocks.0.hook_resid_*",
)


def usable(model: HookedVLA) -> list[str]:
    """The sites that have a vector for each token, all in one forward pass."""
    found = []
    for name in model.points:
        try:
            site_groups(model, name)
        except ValueError:
            continue
        if name != "head.hook_action_tokens":
            found.append(name)
    return found


def take(model, batch, noise, capture: Capture, episodes=None, env_step: int = 40):
    names = Names()
    taker = RowTaker(model, capture, names)
    taker.watch(EPISODES[: model.prepare(batch).batch_size] if episodes is None else episodes)
    model.run_state.env_step = env_step
    try:
        with torch.no_grad(), model.hooks(taker.requests()):
            _, cache = model.run_with_cache(batch, taker.sites, noise=noise)
    finally:
        model.run_state.env_step = None
    return taker.take(), cache, names


def values_at(cache, site: str, ids: torch.Tensor) -> torch.Tensor:
    """What the cache has for rows with these ids."""
    value, denoised = cache[site], is_denoised(site)
    value = value if denoised else value[None]
    tokens = value.shape[1] * (value.shape[2] if value.ndim > 3 else 1)
    value = value.reshape(len(value), cache.batch_size, tokens // cache.batch_size, -1)
    assert denoised or set(ids[:, 2].tolist()) == {NONE}
    row = [EPISODES.index(episode) for episode in ids[:, 0].tolist()]
    return value[ids[:, 2].clamp(min=0), row, ids[:, 5]]


@unchecked_shapes()
@pytest.mark.parametrize("name", list_models())
def test_every_row_of_every_site_is_where_its_ids_say(name):
    golden = read_golden(name)
    model = HookedVLA.from_pretrained(golden.folder).requires_grad_(False)
    sites = usable(model)
    rows, cache, names = take(model, golden.batch, golden.noise, Capture(sites))
    assert len(rows) > 20
    for site, (values, ids) in rows.items():
        assert len(values) > 0 and torch.equal(values, values_at(cache, site, ids)), site
    for first, *_ in site_groups(model, sites):
        ids = rows[first].ids
        assert len(ids) == len({tuple(row) for row in ids.tolist()}) and set(ids[:, 1].tolist()) == {40}
        _check_segments(model.points[first], cache.segments, cache.batch_size, ids, names)


def _check_segments(point: HookPoint, table, batch: int, ids, names: Names) -> None:
    """Segments are those of the stream, padding left out and everything else there as often as it should be."""
    axis = point.axes[1] if len(point.axes) > 2 else ""
    if axis not in point.streams:
        assert set(ids[:, 3].tolist()) == {NONE} == set(ids[:, 4].tolist())
        return
    segments = table[point.streams[axis]]
    per_row = len(segments.labels) // batch
    labels = segments.labels.reshape(batch, per_row * segments.labels.shape[1])
    steps = max(len(set(ids[:, 2].tolist())), 1)
    for row, episode in enumerate(EPISODES[:batch]):
        own = ids[ids[:, 0] == episode]
        expected = Counter(n for label in labels[row].tolist() if (n := segments.names[label]) != PAD)
        assert Counter(names.segment[i] for i in own[:, 3].tolist()) == {k: n * steps for k, n in expected.items()}
        for _, _, _, segment, camera, position in own[:: max(1, len(own) // 20)].tolist():
            name = segments.names[int(labels[row, position])]
            assert names.segment[segment] == name
            assert (names.camera[camera] if camera != NONE else None) == (
                name.removeprefix("image:") if name.startswith("image:") else None
            )


@pytest.fixture(scope="module")
def small():
    golden = read_golden("smolvla")
    return HookedVLA.from_pretrained(golden.folder).requires_grad_(False), golden


def test_means_are_those_of_the_tokens(small):
    model, golden = small
    sites = [RESID, EXPERT, VISION]
    tokens, _, names = take(model, golden.batch, golden.noise, Capture(sites))
    for pooling, columns in (("mean", [0, 2]), ("segment_mean", [0, 2, 3])):
        means, _, others = take(model, golden.batch, golden.noise, Capture(sites, pooling))
        assert others == names
        for site, (values, ids) in means.items():
            assert len({tuple(row) for row in ids.tolist()}) == len(ids) and set(ids[:, 5].tolist()) == {NONE}
            all_ids = tokens[site].ids
            keys = {tuple(row) for row in all_ids[:, columns].tolist()}
            assert keys == {tuple(row) for row in ids[:, columns].tolist()}
            for mean, row in zip(values, ids, strict=True):
                own = (all_ids[:, columns] == row[columns]).all(1)
                assert_close(mean, tokens[site].values[own].mean(0))
                if pooling == "segment_mean":
                    assert set(all_ids[own][:, 4].tolist()) == {int(row[4])}


def test_only_what_is_asked_for_is_taken(small):
    model, golden = small
    capture = Capture([RESID, EXPERT], segments=("image:*", "action"), denoise_steps=frozenset({0, 3}))
    rows, _, names = take(model, golden.batch, golden.noise, capture)
    for site, (_, ids) in rows.items():
        taken = {names.segment[i] for i in ids[:, 3].tolist()}
        assert taken == ({"action"} if site == EXPERT else {n for n in names.segment if n.startswith("image:")})
        assert set(ids[:, 2].tolist()) == ({0, 3} if site == EXPERT else {NONE})


def test_rows_without_an_episode_or_whose_episode_is_over_are_left_out(small):
    model, golden = small
    rows, _, _ = take(model, golden.batch, golden.noise, Capture(RESID), episodes=[NONE, 3])
    assert {int(i) for each in rows.values() for i in each.ids[:, 0].unique()} == {3}
    model.run_state.in_use = [True, False]
    try:
        rows, _, _ = take(model, golden.batch, golden.noise, Capture(RESID))
    finally:
        model.run_state.in_use = None
    assert {int(i) for each in rows.values() for i in each.ids[:, 0].unique()} == {7}


def test_sites_of_a_group_share_ids_and_dtype_is_as_asked(small):
    model, golden = small
    rows, _, _ = take(model, golden.batch, golden.noise, Capture([RESID, EXPERT], dtype=torch.bfloat16))
    groups = site_groups(model, [RESID, EXPERT])
    assert [len(sites) for sites in groups] == [len(rows) - 1, 1]
    assert all(rows[site].ids is rows[groups[0][0]].ids for site in groups[0])
    assert {each.values.dtype for each in rows.values()} == {torch.bfloat16}


def test_sites_without_vectors_and_other_mistakes_are_named(small):
    model, golden = small
    with pytest.raises(ValueError, match=r"vlm.blocks.0.attn.hook_pattern has axes .*needs vectors"):
        site_groups(model, "vlm.blocks.0.attn.hook_pattern")
    with pytest.raises(KeyError, match="nearest"):
        site_groups(model, "vlm.blocks.99.hook_resid_post")
    with pytest.raises(ValueError, match="unknown pooling 'max'; choose one of"):
        Capture(RESID, "max")
    with pytest.raises(ValueError, match=r"no denoise steps \[99\]: the model has 0\.\."):
        RowTaker(model, Capture(EXPERT, denoise_steps=frozenset({99})), Names())
    with pytest.raises(ValueError, match="of sites that have none"):
        RowTaker(model, Capture(RESID, denoise_steps=frozenset({0})), Names())
    with pytest.raises(RuntimeError, match="outside a rollout"):
        take(model, golden.batch, golden.noise, Capture(RESID), env_step=None)


def test_a_value_that_is_not_finite_is_named_with_its_ids(small):
    model, golden = small

    def spoil(value, hook):
        value = value.clone()
        value[1, 5, 2] = torch.nan
        return value

    site = "vlm.blocks.0.hook_resid_post"
    with model.hooks([(site, spoil)]), pytest.raises(ValueError, match=rf"{site}: 1 of .*not finite.*episode 3, env_"):
        take(model, golden.batch, golden.noise, Capture(site))


def test_earlier_rows_of_the_same_token_are_found():
    ids = torch.tensor([[e, step, d, s, NONE, p] for step in (0, 4) for e in (2, 1) for d in (NONE, 3)
                        for s, p in ((0, 0), (0, 1), (1, 2))], dtype=torch.int32)  # fmt: skip
    before, now = ids[:12][torch.randperm(12)], ids[12:]
    found = previous_rows(before, now)
    for i, place in enumerate(found.tolist()):
        assert before[place].tolist() == [*now[i, :1].tolist(), 0, *now[i, 2:].tolist()]
    assert previous_rows(before[:0], now).tolist() == [NONE] * 12
    other = now.clone()
    other[:, 0] += 5
    assert previous_rows(before, other).tolist() == [NONE] * 12


def test_ids_are_told_and_looked_up_by_name():
    names = Names(["image:top", "language"], ["top"])
    assert (
        describe([4, 8, NONE, 0, 0, 15], names) == "episode 4, env_step 8, segment image:top, camera top, position 15"
    )
    assert id_numbers(names, "segment", ["image:*", 1]) == [0, 1] and id_numbers(names, "episode", [3]) == [3]
    with pytest.raises(KeyError, match="no camera 'left'; there are"):
        id_numbers(names, "camera", ["left"])
    with pytest.raises(ValueError, match="unknown id 'layer'; ids: "):
        id_numbers(names, "layer", [1])
    assert len(IDS) == 6
