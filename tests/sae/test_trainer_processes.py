"""Training in processes of its own: one that is killed, and two that share batches, end where one alone ends."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_saes import SITE, settings, source

from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.config import SAEConfig
from hooked_vla.sae.trainer import train

# a source that kills its process when it is asked for batch number argv[2]
SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from hooked_vla.sae.trainer import train
from test_trainer_processes import HOW, configs
from toy_saes import source
made = source()
def batches(n, original=made.batches):
    for number, rows in enumerate(original(n)):
        if number == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield rows
made.batches = batches
train(made, configs(), sys.argv[1], **HOW)
"""
HOW = {"save_every": 10, "log_every": 5, "progress": False}


def configs() -> list[SAEConfig]:
    """What has memory of its own: a threshold, dead features, resampling, normalisation."""
    return [
        settings("batch_topk", steps=22, aux_k=8, dead_after=256, resample_every=6, seed=1),
        settings("topk", steps=22, seed=2, normalisation="zscore"),
        settings("jumprelu", steps=22, penalty=0.02, bandwidth=0.2),
    ]


def run(out: Path, dies: int, processes: int) -> list[int]:
    """Exit codes of the training's processes."""
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        # what `accelerate launch --cpu` sets
        several = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                   "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "ACCELERATE_USE_CPU": "true"}  # fmt: skip
        env = dict(os.environ, OMP_NUM_THREADS="1") | (several if processes > 1 else {})
        command = [sys.executable, "-c", script, str(out), str(dies)]
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    codes = []
    for each in started:
        _, said = each.communicate(timeout=300)
        codes.append(each.returncode)
        assert each.returncode in (0, -signal.SIGKILL), said
    return codes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts, in one process."""
    folder = tmp_path_factory.mktemp("whole")
    train(source(), configs(), folder, **HOW)  # pyright: ignore[reportArgumentType]
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_run_goes_on_to_the_same_bits(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path, dies=16, processes=1) == [-signal.SIGKILL]
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-000000010"]
    train(source(), configs(), tmp_path, **HOW)  # pyright: ignore[reportArgumentType]
    expected, found = files(whole), files(tmp_path)
    # the lock, what it was begun with, and config, weights and log of each
    assert len(expected) == 11 and set(found) == set(expected)
    assert not [name for name in expected if expected[name] != found[name]]
    steps = [line.split(",")[0] for line in found[f"{SITE}-0/log.csv"].decode().splitlines()]
    assert steps == ["step", "5", "10", "15", "20"]


def test_two_processes_give_what_one_gives(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path, dies=-1, processes=2) == [0, 0]
    for i, config in enumerate(configs()):
        one, two = (load_file(folder / f"{SITE}-{i}" / "sae.safetensors") for folder in (whole, tmp_path))
        untrained = SparseAutoencoder(config).w_enc.detach()
        for name, value in one.items():
            torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        # it is not that nothing was learned
        assert float((one["w_enc"] - untrained).norm(dim=1).median()) > 0.05
