"""Stores: what comes out is what went in, a killed writer goes on exactly, and damage is named."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hooked_vla.sae.rows import IDS, NONE, Rows
from hooked_vla.sae.store import MANIFEST, TokenStore
from hooked_vla.sae.store_writer import StoreWriter

A, B, C = "vlm.blocks.0.hook_resid_post", "vlm.blocks.1.hook_resid_post", "expert.blocks.0.hook_resid_post"
GROUPS = [[A, B], [C]]
ABOUT = {"model": "m", "suite": "goal"}
N_A, N_C = 5, 7


def forward(episode: int, env_step: int, names, wide: int = 3) -> dict[str, Rows]:
    """Rows that say in their values and ids which they are."""
    segments = [names.number("segment", name) for name in ("image:top", "language")]
    camera = names.number("camera", "top")
    found = {}
    for site, n, denoise in ((A, N_A, NONE), (B, N_A, NONE), (C, N_C, 2)):
        ids = torch.tensor([[episode, env_step, denoise, segments[i % 2], (camera, NONE)[i % 2], i] for i in range(n)])
        values = (1000 * episode + 10 * env_step + torch.arange(n, dtype=torch.float32))[:, None].repeat(1, wide)
        values = -values if site == B else values
        found[site] = Rows(values if site != C else values[:, :2].to(torch.bfloat16), ids.to(torch.int32))
    found[B] = Rows(found[B].values, found[A].ids)
    return found


def write(folder: Path, episodes=range(4), shard_rows: int = 16, finish: bool = True) -> Path:
    """Two steps of each episode; one commit an episode."""
    with StoreWriter(folder, ABOUT, shard_rows) as writer:
        for episode in episodes:
            if episode not in writer.episodes:
                for step in (0, 4):
                    writer.add(forward(episode, step, writer.names), GROUPS)
                writer.commit([episode])
        if finish:
            writer.finish()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_what_goes_in_comes_out_with_its_ids(tmp_path):
    store = TokenStore(write(tmp_path / "s"))
    assert store.complete and store.episodes == [0, 1, 2, 3] and store.groups == GROUPS and store.about == ABOUT
    assert store.widths == {A: 3, B: 3, C: 2} and store.dtype(C) == torch.bfloat16
    assert (store.n_rows(A), store.n_rows(C)) == (4 * 2 * N_A, 4 * 2 * N_C)
    expected = [forward(episode, step, store.names) for episode in range(4) for step in (0, 4)]
    for site in (A, B, C):
        values, ids = (torch.cat(part) for part in zip(*(each[site] for each in expected), strict=True))
        everything = torch.arange(store.n_rows(site))
        assert torch.equal(store.ids(site), ids) and torch.equal(store.read(site, everything), values)
        order = torch.randperm(len(values))[:23]
        assert torch.equal(store.read(site, order), values[order])
        into = torch.empty(21, values.shape[1], dtype=values.dtype)
        store.copy(site, 13, into)
        assert torch.equal(into, values[13:34])
    store.verify()


def test_shards_are_plain_safetensors_of_so_many_rows(tmp_path):
    folder = write(tmp_path / "s")
    files = sorted((folder / "group-0").glob("*"))
    assert [file.name for file in files] == ["000000.safetensors", "000001.safetensors", "000002.safetensors"]
    shards = [load_file(file) for file in files]
    assert [len(shard["ids"]) for shard in shards] == [16, 16, 8] and set(shards[0]) == {"ids", A, B}
    assert shards[0]["ids"].dtype == torch.int32 and list(shards[2][A].shape) == [8, 3]
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["ids"] == list(IDS) and [each["rows"] for each in manifest["groups"][0]["shards"]] == [16, 16, 8]


def test_the_same_rows_give_the_same_bytes(tmp_path):
    assert contents(write(tmp_path / "a")) == contents(write(tmp_path / "b"))


def test_rows_are_found_by_ids(tmp_path):
    store = TokenStore(write(tmp_path / "s"))
    found = store.find(A, {"episode": [1, 3], "segment": ["image:*"]})
    ids = store.ids(A)[found]
    assert set(ids[:, 0].tolist()) == {1, 3} and set(ids[:, 3].tolist()) == {0} and len(found) == 2 * 2 * 3
    assert torch.equal(store.find(C, {"camera": ["top"]}), store.find(C, {"segment": ["image:top"]}))
    with pytest.raises(KeyError, match="no segment 'state'"):
        store.find(A, {"segment": ["state"]})


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_writer_that_was_killed_goes_on_exactly(tmp_path, stop):
    """stop: forward passes after which it ends, within episodes and at their ends, before and after full shards."""
    whole, folder = contents(write(tmp_path / "whole")), tmp_path / "s"
    writer = StoreWriter(folder, ABOUT, 16)
    for number in range(stop):
        writer.add(forward(number // 2, 4 * (number % 2), writer.names), GROUPS)
        if number % 2:
            writer.commit([number // 2])
    writer.close()
    reader = TokenStore(folder)
    assert not reader.complete and list(reader.episodes) == list(range(stop // 2))
    if stop >= 2:
        assert reader.n_rows(C) == stop // 2 * 2 * N_C
        assert torch.equal(reader.read(A, torch.tensor([9])), torch.full((1, 3), 44.0))
    assert contents(write(folder)) == whole


def test_a_process_that_dies_at_once_loses_what_was_not_committed_only(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_store import *
writer = StoreWriter({str(tmp_path / "s")!r}, ABOUT, 16)
for step in (0, 4):
    writer.add(forward(0, step, writer.names), GROUPS)
writer.commit([0])
writer.add(forward(1, 0, writer.names), GROUPS)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert contents(write(tmp_path / "s")) == contents(write(tmp_path / "whole"))


def test_finishing_again_changes_nothing_and_finished_stores_take_nothing(tmp_path):
    folder = write(tmp_path / "s")
    before = contents(folder)
    assert contents(write(folder)) == before
    with StoreWriter(folder, ABOUT, 16) as writer, pytest.raises(ValueError, match="is finished"):
        writer.add(forward(9, 0, writer.names), GROUPS)


def test_a_kill_while_the_last_shard_is_made_leaves_a_store_that_goes_on(tmp_path, monkeypatch):
    folder = write(tmp_path / "s", finish=False)
    with StoreWriter(folder, ABOUT, 16) as writer:
        monkeypatch.setattr(writer, "_write", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
    assert TokenStore(folder).n_rows(A) == 40
    assert contents(write(folder)) == contents(write(tmp_path / "whole"))


@pytest.mark.parametrize("place", ["open", "full"])
def test_a_writer_does_not_go_on_with_a_truncated_shard(tmp_path, place):
    """Filled up with zeros, it would pass for whole."""
    folder = write(tmp_path / "s", range(2), finish=False)
    suffix = "partial" if place == "open" else "safetensors"
    damaged = next(folder.glob(f"group-0/*.{suffix}"))
    os.truncate(damaged, 100)
    with pytest.raises(ValueError, match=f"{damaged.name} is truncated"):
        StoreWriter(folder, ABOUT, 16)
    # nor does it hold on to the folder
    with pytest.raises(ValueError, match="is truncated"):
        StoreWriter(folder, ABOUT, 16)


def test_two_writers_are_refused(tmp_path):
    with StoreWriter(tmp_path / "s", ABOUT) as writer:
        with pytest.raises(BlockingIOError, match="another process is writing the store .*s"):
            StoreWriter(tmp_path / "s", ABOUT)
        writer.add(forward(0, 0, writer.names), GROUPS)
        writer.commit([0])
    assert TokenStore(tmp_path / "s").n_rows(A) == N_A


@pytest.mark.parametrize("kind", ["cut", "missing", "header", "longer"])
def test_a_damaged_shard_is_named(tmp_path, kind):
    folder = write(tmp_path / "s")
    file = folder / "group-0/000001.safetensors"
    content = file.read_bytes()
    file.unlink()
    if kind != "missing":
        changed = {"cut": content[:-1], "longer": content + b"0", "header": content.replace(b"blocks.0", b"blocks.7")}
        file.write_bytes(changed[kind])
    said = {"cut": "truncated", "longer": "truncated or was changed", "missing": "missing", "header": "header differs"}
    with pytest.raises(ValueError, match=f"group-0/000001.safetensors is .*{said[kind]}"):
        TokenStore(folder)


def test_a_changed_number_is_found_by_its_checksum(tmp_path):
    folder = write(tmp_path / "s")
    file = folder / "group-1/000002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="group-1/000002.safetensors was changed: its SHA-256"):
        TokenStore(folder).verify()


def test_a_damaged_or_foreign_folder_is_named(tmp_path):
    folder = write(tmp_path / "s")
    (folder / MANIFEST).write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=r"manifest.json is not of the format"):
        TokenStore(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        TokenStore(folder)
    with pytest.raises(FileNotFoundError, match="not a store of activations"):
        TokenStore(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds \['thesis.tex'\]: choose an empty folder"):
        StoreWriter(tmp_path / "full", ABOUT)
    with pytest.raises(NotADirectoryError, match="is a file"):
        StoreWriter(tmp_path / "full/thesis.tex", ABOUT)


def test_another_store_is_not_gone_on_with(tmp_path):
    folder = write(tmp_path / "s", range(1), finish=False)
    with pytest.raises(ValueError, match="another store: suite: 'goal' there, 'object' now"):
        StoreWriter(folder, {**ABOUT, "suite": "object"}, 16)
    with pytest.raises(ValueError, match="shard_rows: 16 there, 32 now"):
        StoreWriter(folder, ABOUT, 32)
    with StoreWriter(folder, ABOUT, 16) as writer:
        with pytest.raises(ValueError, match=rf"{A}: rows of torch.float32 \[4\], but .* has torch.float32 \[3\]"):
            writer.add(forward(1, 0, writer.names, wide=4), GROUPS)
        with pytest.raises(ValueError, match="holds the sites"):
            writer.add(forward(1, 0, writer.names), [[A], [C]])
        rows = forward(1, 0, writer.names)
        rows[B] = Rows(rows[B].values, rows[B].ids + 1)
        with pytest.raises(ValueError, match=f"{B}: its rows are of other tokens than those of {A}"):
            writer.add(rows, GROUPS)
        with pytest.raises(ValueError, match=r"episodes \[0\] are in"):
            writer.commit([0])


def test_what_is_not_there_is_named(tmp_path):
    store = TokenStore(write(tmp_path / "s"))
    with pytest.raises(KeyError, match=r"'vlm.blocks.9.hook_resid_post' is not in the store .*nearest: \['vlm"):
        store.n_rows("vlm.blocks.9.hook_resid_post")
    with pytest.raises(IndexError, match="rows 3 to 40 of .*which has 40"):
        store.read(A, torch.tensor([3, 40]))
    with pytest.raises(IndexError, match="rows 30 to 50"):
        store.copy(A, 30, torch.empty(20, 3))


def test_a_full_disk_leaves_what_was_committed(tmp_path, monkeypatch):
    folder = write(tmp_path / "s", range(1), finish=False)
    with StoreWriter(folder, ABOUT, 16) as writer, monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match=r"No space left.*group-0/000000.partial"):
            writer.add(forward(1, 0, writer.names), GROUPS)
    assert TokenStore(folder).n_rows(A) == 10
    assert contents(write(folder)) == contents(write(tmp_path / "whole"))
