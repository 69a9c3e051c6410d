"""The ring: no row twice, sites of a group together, rows of many blocks mixed, exact resume, and its memory."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from hooked_vla.sae.buffer import RingBuffer
from hooked_vla.sae.source import Source

WIDTHS, GROUPS = {"a": 3, "b": 2, "c": 2}, [["a", "b"], ["c"]]
STATM = Path("/proc/self/statm")
# rows of a forward pass in each group
N_A, N_C = 5, 3


def forwards(units: int | None = None, per_unit: int = 4):
    """A stream whose rows carry their number in the stream; the number of those made is counted."""

    def stream(position):
        unit, number = position
        while units is None or unit < units:
            while number < per_unit:
                stream.made += 1
                at = unit * per_unit + number
                a, c = torch.arange(N_A) + at * N_A, torch.arange(N_C) + at * N_C
                rows = {"a": a[:, None].repeat(1, 3), "b": -a[:, None].repeat(1, 2), "c": c[:, None].repeat(1, 2)}
                yield (unit, number), {site: each.float() for site, each in rows.items()}
                number += 1
            unit, number = unit + 1, 0

    stream.made = 0
    return stream


def ring(units: int | None = None, **settings) -> RingBuffer:
    settings = {"seed": 0, "capacity": 80, "n_blocks": 4} | settings
    return RingBuffer(forwards(units), WIDTHS, GROUPS, **settings)


def seen(buffer: RingBuffer, batch_size: int, n: int) -> list[tuple[list[float], list[float]]]:
    batches = buffer.batches(batch_size)
    return [(batch["a"][:, 0].tolist(), batch["c"][:, 0].tolist()) for _, batch in zip(range(n), batches, strict=False)]


def test_no_row_comes_twice_and_sites_of_a_group_belong_together():
    rows = Counter()
    batches = ring().batches(7)
    for _ in range(60):
        batch = next(batches)
        assert {site: list(each.shape) for site, each in batch.items()} == {"a": [7, 3], "b": [7, 2], "c": [7, 2]}
        assert torch.equal(batch["a"][:, 0], -batch["b"][:, 0])
        rows.update(("a", row) for row in batch["a"][:, 0].tolist())
        rows.update(("c", row) for row in batch["c"][:, 0].tolist())
    assert rows.total() == 60 * 7 * 2 and set(rows.values()) == {1}


def test_a_stream_that_ends_is_handed_out_whole():
    buffer = RingBuffer(forwards(9), {"a": 3, "b": 2}, [["a", "b"]], seed=0, capacity=40, n_blocks=4)
    batches = list(buffer.batches(8))
    rows = torch.cat([batch["a"][:, 0] for batch in batches])
    assert sorted(rows.tolist()) == list(range(9 * 4 * N_A)) and [len(b["a"]) for b in batches[:-1]] == [8] * 22
    assert list(buffer.batches(8)) == []
    again = RingBuffer(forwards(9), {"a": 3, "b": 2}, [["a", "b"]], seed=0, capacity=40, n_blocks=4)
    again.load_state_dict(buffer.state_dict())
    assert list(again.batches(8)) == []


def test_a_batch_mixes_all_blocks_once_the_ring_is_full():
    buffer = ring(capacity=800, n_blocks=8)
    first = next(buffer.batches(5))["a"][:, 0]
    assert float(first.max()) < 100, "the first batch must not wait for more than one block"
    batches = buffer.batches(16)
    for _ in range(60):
        next(batches)
    blocks = [len((next(batches)["a"][:, 0] // 100).unique()) for _ in range(20)]
    # one more where a batch goes over the end of a window
    assert min(blocks) >= 5 and max(blocks) <= 9


@pytest.mark.parametrize("batch_size", [1, 7, 33])
def test_it_goes_on_exactly_where_it_stopped(batch_size):
    n = 6 + 60 // batch_size
    whole = seen(ring(), batch_size, n)
    for stop in (0, 1, n // 2, n - 1):
        first, second = ring(), ring()
        seen(first, batch_size, stop)
        state = first.state_dict()
        second.load_state_dict(state)
        assert second.state_dict() == state
        assert seen(second, batch_size, n - stop) == whole[stop:]
        first.close()
        assert seen(first, batch_size, n - stop) == whole[stop:]


def test_to_resume_runs_no_more_than_a_ring_again():
    stream = forwards()
    buffer = RingBuffer(stream, WIDTHS, GROUPS, seed=0, capacity=80, n_blocks=4)
    seen(buffer, 7, 100)
    before, again = stream.made, ring()
    again.load_state_dict(buffer.state_dict())
    seen(again, 7, 1)
    # the ring, and the blocks that one more batch needs
    assert before > 150 and again._make.made <= (80 + 3 * 20) / N_A + 1


def test_other_seeds_and_only_these_give_other_orders():
    assert seen(ring(), 7, 5) == seen(ring(), 7, 5) != seen(ring(seed=1), 7, 5)


def test_a_sample_is_always_the_same_and_changes_nothing():
    buffer, whole = ring(), seen(ring(), 7, 30)
    early = buffer.sample(12)
    assert seen(buffer, 7, 20) == whole[:20]
    late = buffer.sample(12)
    assert all(torch.equal(early[site], late[site]) for site in WIDTHS) and len(early["a"]) == 12
    assert len(buffer.sample(1000)["a"]) == 20 and seen(buffer, 7, 10) == whole[20:]
    assert isinstance(buffer, Source)


@pytest.mark.skipif(not STATM.exists(), reason=f"{STATM} tells what a process holds, and {sys.platform} has none")
@pytest.mark.parametrize("capacity", [2**14, 2**15])
def test_memory_is_what_the_formula_says(capacity: int):
    """In a process of its own: one that has run other tests holds memory that it uses again."""
    code = f"import test_buffer; test_buffer.measure_memory({capacity})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def measure_memory(capacity: int) -> None:
    def resident() -> int:
        return int(STATM.read_text().split()[1]) * 4096

    widths, rows = {"a": 300, "b": 200, "c": 100}, 512

    def stream(position):
        for number in range(position[1], 10**6):
            yield (0, number), {site: torch.ones(rows, width) for site, width in widths.items()}

    buffer = RingBuffer(stream, widths, GROUPS, seed=0, capacity=capacity)
    formula = capacity * (4 * 600 + 8 * 2) + 8 * 2 * capacity // 8
    assert buffer.n_bytes == formula
    before = resident()
    batches = buffer.batches(256)
    for _ in range(2 * capacity // 256):
        next(batches)
    # a forward pass, a batch, what the allocator keeps of the last ones, and what libraries load at their first use
    slack, grown = 8 * rows * 600 * 4 + 2**22, resident() - before
    assert 0.95 * formula < grown < formula + slack, (grown, formula, slack)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="buffer of 81 rows cannot be cut into 4 blocks"):
        ring(capacity=81)
    with pytest.raises(ValueError, match="groups hold .*'c'.*, but the widths"):
        RingBuffer(forwards(), {"a": 3, "b": 2}, GROUPS, seed=0)
    with pytest.raises(ValueError, match="n_blocks must be at least 1, got 0"):
        ring(n_blocks=0)
    with pytest.raises(ValueError, match="brings 5 rows, but a block of the buffer holds 4: .* at least 20"):
        next(ring(capacity=16).batches(2))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        ring().batches(0)
    with pytest.raises(ValueError, match="capacity 80 instead of 160"):
        ring(capacity=160).load_state_dict(ring().state_dict())

    def no_c(position):
        yield (0, 0), {"a": torch.zeros(5, 3), "b": torch.zeros(5, 2), "c": torch.zeros(0, 2)}

    with pytest.raises(ValueError, match=r"no rows of \['c'\] came with 5 rows of other sites"):
        next(RingBuffer(no_c, WIDTHS, GROUPS, seed=0, capacity=80).batches(2))


def test_what_the_stream_raises_passes():
    def broken(position):
        raise RuntimeError("the simulator is gone")
        yield

    with pytest.raises(RuntimeError, match="the simulator is gone"):
        next(RingBuffer(broken, WIDTHS, GROUPS, seed=0, capacity=80).batches(2))
