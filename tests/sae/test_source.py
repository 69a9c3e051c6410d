"""Sources in memory: every row once a pass, the same order for the same seed, and exact resume."""

import pytest
import torch

from hooked_vla.sae.source import Source, TensorSource, check_finite, shuffled


def numbered(n: int = 10, **settings) -> TensorSource:
    rows = torch.arange(n).float()
    return TensorSource({"a": rows[:, None].repeat(1, 3), "b": -rows[:, None].repeat(1, 2)}, **settings)


def seen(source: TensorSource, batch_size: int, n_batches: int) -> list[list[int]]:
    batches = source.batches(batch_size)
    return [next(batches)["a"][:, 0].int().tolist() for _ in range(n_batches)]


def test_a_pass_shows_every_row_once_and_sites_stay_together():
    batches = list(numbered(passes=1).batches(4))
    assert [len(batch["a"]) for batch in batches] == [4, 4, 2]
    assert sorted(torch.cat([batch["a"] for batch in batches])[:, 0].tolist()) == list(range(10))
    assert all(torch.equal(batch["a"][:, 0], -batch["b"][:, 0]) for batch in batches)


def test_batches_are_endless_and_full_and_passes_differ_in_order():
    rows = [row for batch in seen(numbered(seed=3), 7, 10) for row in batch]
    assert len(rows) == 70
    passes = [rows[start : start + 10] for start in range(0, 70, 10)]
    assert all(sorted(each) == list(range(10)) for each in passes) and passes[0] != passes[1]
    assert seen(numbered(seed=3), 7, 4) == [rows[start : start + 7] for start in range(0, 28, 7)]
    assert seen(numbered(seed=4), 7, 4) != seen(numbered(seed=3), 7, 4)


def test_it_goes_on_exactly_where_it_stopped():
    whole = seen(numbered(), 3, 12)
    for stop in range(12):
        first, second = numbered(), numbered()
        seen(first, 3, stop)
        second.load_state_dict(first.state_dict())
        assert seen(second, 3, 12 - stop) == whole[stop:]


def test_a_sample_is_always_the_same_and_changes_nothing():
    source = numbered()
    before = source.sample(4)
    first = seen(source, 3, 2)
    assert torch.equal(source.sample(4)["a"], before["a"]) and len(source.sample(99)["b"]) == 10
    assert first == seen(numbered(), 3, 2)


def test_in_order_without_shuffling_and_it_is_a_source():
    source = numbered(shuffle=False, passes=1)
    assert seen(source, 5, 2) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert isinstance(source, Source) and source.widths == {"a": 3, "b": 2} and source.groups == [["a", "b"]]


def test_mistakes_are_named():
    rows = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="same number of rows, got .*'b': 3"):
        TensorSource({"a": rows, "b": rows[:3]})
    rows[2, 1] = torch.inf
    with pytest.raises(ValueError, match="a: 1 of 4 rows are not finite, first row 2, channel 1: inf"):
        TensorSource({"a": rows})
    with pytest.raises(ValueError, match="at least one site"):
        TensorSource({})
    with pytest.raises(ValueError, match="passes must be at least 1, got 0"):
        numbered(passes=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        numbered().batches(0)
    with pytest.raises(ValueError, match="seed 0 instead of 1"):
        numbered(seed=1).load_state_dict(numbered(seed=0).state_dict())


def test_numbers_that_cancel_or_are_large_are_not_taken_for_bad_ones():
    check_finite("a", torch.full((2000, 600), torch.finfo(torch.float32).max))
    for bad in (torch.nan, torch.inf, -torch.inf):
        rows = torch.ones(3, 2)
        rows[1, 0] = bad
        with pytest.raises(ValueError, match="first row 1, channel 0"):
            check_finite("a", rows)
    with pytest.raises(ValueError, match="2 of 2 rows"):
        check_finite("a", torch.tensor([[torch.inf], [-torch.inf]]))


def test_orders_of_neighbouring_numbers_and_seeds_differ():
    orders = {tuple(shuffled(20, seed, number).tolist()) for seed in range(10) for number in range(-1, 10)}
    assert len(orders) == 110
