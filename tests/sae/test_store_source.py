"""Training from a store: every row once a pass, mixed over runs, exact resume, chosen rows, bounded memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hooked_vla.sae.rows import NONE, Rows
from hooked_vla.sae.source import PREVIOUS, Source
from hooked_vla.sae.store import TokenStore
from hooked_vla.sae.store_source import StoreSource
from hooked_vla.sae.store_writer import StoreWriter

A, B, C = "vlm.blocks.0.hook_resid_post", "vlm.blocks.1.hook_resid_post", "expert.blocks.0.hook_resid_post"
N_A, N_C, N_STEPS = 40, 25, 6
EPISODES = 10


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    """Rows whose first number is their number in the store; episodes two by two, as they run side by side."""
    folder = tmp_path_factory.mktemp("store") / "s"
    at = {A: 0, C: 0}
    with StoreWriter(folder, {}, 512) as writer:
        numbers = [writer.names.number("segment", name) for name in ("image:top", "language")]
        for pair in range(EPISODES // 2):
            for step in range(N_STEPS):
                rows = {}
                for site, n in ((A, N_A), (C, N_C)):
                    ids = [[2 * pair + e, 4 * step, NONE, numbers[i % 2], NONE, i] for e in range(2) for i in range(n)]
                    values = (torch.arange(2 * n) + at[site]).float()[:, None].repeat(1, 3)
                    rows[site] = Rows(values, torch.tensor(ids, dtype=torch.int32))
                    at[site] += 2 * n
                rows[B] = Rows(-rows[A].values, rows[A].ids)
                writer.add(rows, [[A, B], [C]])
            writer.commit([2 * pair, 2 * pair + 1])
        writer.finish()
    return TokenStore(folder)


def numbers(batches, site: str = A) -> list[int]:
    return torch.cat([batch[site][:, 0] for batch in batches]).int().tolist()


def test_a_pass_shows_every_row_once_and_sites_stay_together(store):
    batches = list(StoreSource(store, [A, B], seed=0, passes=1, pool_rows=512).batches(128))
    assert sorted(numbers(batches)) == list(range(store.n_rows(A)))
    assert all(torch.equal(batch[A], -batch[B]) for batch in batches)
    assert {len(batch[A]) for batch in batches[:-1]} == {128}


def test_rows_of_runs_from_all_over_are_mixed(store):
    source = StoreSource(store, A, seed=0, pool_rows=1024)
    order = numbers([next(source.batches(512))])
    assert len({row // 256 for row in order}) == 4 and order != sorted(order)
    passes = numbers(StoreSource(store, A, seed=0, passes=2).batches(1000))
    n = store.n_rows(A)
    assert passes[:n] != passes[n:] and sorted(passes[:n]) == sorted(passes[n:])
    assert passes == numbers(StoreSource(store, A, seed=0, passes=2).batches(1000))


@pytest.mark.parametrize("settings", [{}, {"where": {"segment": ["language"]}}, {"previous": True}])
def test_it_goes_on_exactly_where_it_stopped(store, settings):
    def source():
        return StoreSource(store, seed=5, passes=2, pool_rows=512, **settings)

    whole = list(source().batches(200))
    for stop in (0, 1, 7, len(whole) - 1):
        first, second = source(), source()
        for _, _batch in zip(range(stop), first.batches(200), strict=False):
            pass
        second.load_state_dict(first.state_dict())
        rest = list(second.batches(200))
        assert len(rest) == len(whole) - stop
        assert all(torch.equal(a[site], b[site]) for a, b in zip(rest, whole[stop:], strict=True) for site in a)


def test_groups_go_through_their_rows_on_their_own(store):
    source = StoreSource(store, seed=0, passes=1)
    assert source.groups == [[A, B], [C]] and source.widths == {A: 3, B: 3, C: 3} and isinstance(source, Source)
    batches = list(source.batches(100))
    assert sorted(numbers(batches, C)) == list(range(store.n_rows(C)))
    assert all(len(batch[A]) == len(batch[C]) for batch in batches)


def test_only_chosen_rows_come(store):
    source = StoreSource(store, A, passes=1, where={"episode": [3, 4], "segment": ["language"]})
    chosen = store.find(A, {"episode": [3, 4], "segment": ["language"]})
    assert sorted(numbers(source.batches(50))) == chosen.tolist() and source.n_rows == {A: 2 * N_STEPS * N_A // 2}
    with pytest.raises(ValueError, match="no rows of .* are left"):
        StoreSource(store, A, where={"episode": [99]})


def test_the_same_token_one_step_before_comes_beside_it(store):
    source = StoreSource(store, [A, C], seed=0, passes=1, previous=True)
    assert source.groups == [[A, A + PREVIOUS], [C, C + PREVIOUS]] and source.widths[A + PREVIOUS] == 3
    for site in (A, C):
        ids = store.ids(site)
        batches = list(StoreSource(store, site, seed=0, passes=1, previous=True).batches(500))
        now, before = numbers(batches, site), numbers(batches, site + PREVIOUS)
        assert sorted(now) == (ids[:, 1] > 0).nonzero().flatten().tolist()
        assert torch.equal(ids[now][:, [0, 2, 3, 4, 5]], ids[before][:, [0, 2, 3, 4, 5]])
        assert torch.equal(ids[now][:, 1], ids[before][:, 1] + 4)


def test_in_order_without_shuffling(store):
    assert numbers(StoreSource(store, A, passes=1, shuffle=False, pool_rows=512).batches(300)) == list(
        range(store.n_rows(A))
    )


def test_a_sample_is_always_the_same_and_changes_nothing(store):
    source = StoreSource(store, seed=1)
    early = source.sample(300)
    first = numbers([next(source.batches(64))])
    late = source.sample(300)
    assert all(torch.equal(early[site], late[site]) for site in early) and len({*numbers([early])}) == 300
    assert len(source.sample(10**6)[C]) == store.n_rows(C)
    assert first == numbers([next(StoreSource(store, seed=1).batches(64))])


def test_mistakes_are_named(store):
    with pytest.raises(KeyError, match="nearest"):
        StoreSource(store, "vlm.blocks.7.hook_resid_post")
    with pytest.raises(ValueError, match="pool_rows must be at least 256"):
        StoreSource(store, pool_rows=255)
    with pytest.raises(ValueError, match="seed 0 instead of 1"):
        StoreSource(store, seed=1).load_state_dict(StoreSource(store, seed=0).state_dict())


STATUS = Path("/proc/self/status")


@pytest.mark.skipif(not STATUS.exists(), reason=f"{STATUS} tells what a process holds, and {sys.platform} has none")
def test_memory_is_what_the_formula_says_however_large_the_store(tmp_path):
    """In a process of its own: one that has run other tests holds memory that it uses again."""
    code = f"import test_store_source as t; from pathlib import Path; t.measure_memory(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def measure_memory(folder: Path) -> None:
    def own() -> int:
        # memory of its own: pages of mapped files, which the system takes back when it likes, are not counted
        return 1024 * int(
            next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon")).split()[1]
        )

    width, n = 256, 4096
    site = Rows(torch.randn(n, width), torch.arange(6 * n, dtype=torch.int32).view(n, 6))
    with StoreWriter(folder / "s", {}, 16384) as writer:
        before = own()
        for _ in range(32):
            writer.add({A: site}, [[A]])
        assert own() - before < 2 * n * width * 4
        writer.commit([0])
        writer.finish()
    store = TokenStore(folder / "s")
    source = StoreSource(store, pool_rows=32768)
    formula = 32768 * (4 * width + 8) + 8 * 512
    assert source.n_bytes == formula
    before = own()
    batches = source.batches(1024)
    for _ in range(130):
        next(batches)
    # a batch, its gathered rows and its order
    assert 0.95 * formula < own() - before < formula + 8 * 1024 * width * 4
