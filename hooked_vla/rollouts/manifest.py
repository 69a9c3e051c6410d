"""What a folder of results says about itself: model, suite, arms, seeds, settings, versions, commit.

It is written before the first episode and never again, and holds nothing that differs when the same sweep is run
twice: going on in a folder compares the whole of it.
"""

import hashlib
import json
import logging
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hooked_vla
from hooked_vla.folders import write_json
from hooked_vla.rollouts.arms import Arm, describe_arms
from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.records import MANIFEST, read_manifest
from hooked_vla.rollouts.settings import Settings
from hooked_vla.rollouts.suites import Suite
from hooked_vla.vla import HookedVLA

logger = logging.getLogger(__name__)

FORMAT = "hooked-vla rollouts 1"
# what decides the bits of an episode or of the files
PACKAGES = ("hooked-vla", "torch", "transformers", "tokenizers", "numpy", "gymnasium", "mujoco", "pyarrow")
# differences here may change the last bits only: they are told, not refused
_MACHINE = "machine"
_SHOWN = 10


def weight_hash(model: HookedVLA) -> str:
    """SHA-256 over the weights (name, dtype, shape, bytes) and over the checkpoint's small files and statistics."""
    digest = hashlib.sha256()
    for name, tensor in sorted((model.net.state_dict() | model.statistics).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    for name, content in sorted(model.sidecars.items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def describe_model(name: str, model: HookedVLA | None) -> dict[str, Any]:
    """A model for the manifest; None: no network acts, as with a scripted expert."""
    if model is None:
        return {"name": name, "weights": None, "spec": None}
    return {"name": name, "weights": weight_hash(model), "spec": _plain(asdict(model.spec))}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the last bits of a sum depend on, besides software."""
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": device_name, "architecture": platform.machine(), "cpu": torch.backends.cpu.get_cpu_capability()}


def describe_versions(more: Sequence[str] = ()) -> dict[str, str | None]:
    """Versions of Python and of the packages that episodes depend on, and the commit of a checkout of this one.

    more: packages besides those of every suite.
    """
    found: dict[str, str | None] = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"commit": _commit()}


def make_manifest(
    model: Mapping[str, Any], suite: Suite, scenes: Sequence[Scene], arms: Sequence[Arm], settings: Settings,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """The manifest of a sweep; model: from `describe_model`.

    Raises ValueError for arms that cannot be described, see `describe_arms`.
    """
    return {
        "format": FORMAT,
        "model": dict(model),
        "suite": {
            "name": suite.name,
            "tasks": {task.id: task.instruction for task in suite.tasks},
            "d_state": suite.d_state,
            "d_action": suite.d_action,
            "fps": suite.fps,
            "render": None if suite.quality is None else suite.quality(),
        },
        "arms": describe_arms(arms),
        "settings": _plain(asdict(settings)),
        "scenes": [[scene.task, scene.seed] for scene in scenes],
        "versions": describe_versions(suite.packages),
        _MACHINE: describe_machine(device),
    }


def claim_folder(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make the folder that of this sweep: by writing its manifest, or by finding the same one there.

    Raises ValueError where the manifest there is damaged or differs (naming what differs), or where other files are;
    NotADirectoryError for a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; results go into a folder")
    if (folder / MANIFEST).is_file():
        compare(read_manifest(folder), manifest, str(folder))
        return
    others = [path.name for path in folder.iterdir() if not path.name.endswith(".tmp")] if folder.is_dir() else []
    if others:
        raise ValueError(f"{folder} has no {MANIFEST}, but holds {sorted(others)[:5]}: choose an empty folder")
    write_json(folder / MANIFEST, manifest)


def compare(recorded: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raises ValueError naming the entries in which a recorded manifest differs from that of the sweep at hand.

    Another machine is only warned of.
    """
    if recorded.get("format") != FORMAT:
        raise ValueError(f"{where}: its manifest has format {recorded.get('format')!r}, expected {FORMAT!r}")
    found = differences(recorded, now)
    machine = [text for path, text in found if path.startswith(f"{_MACHINE}.")]
    if machine:
        logger.warning("%s was begun on another machine, the last bits may differ: %s", where, "; ".join(machine))
    other = [text for path, text in found if not path.startswith(f"{_MACHINE}.")]
    if other:
        raise ValueError(
            f"{where} was recorded with other settings: {listed(other)}. Go on with those of {MANIFEST}, or record "
            "into another folder"
        )


def listed(texts: Sequence[str]) -> str:
    """The first ten, and how many more there are."""
    more = [f"and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return "; ".join([*texts[:_SHOWN], *more])


def differences(recorded: Any, now: Any) -> list[tuple[str, str]]:
    """Path and description of every entry in which data that was recorded as JSON differs from data at hand."""
    return _differences("", _plain(recorded), _plain(now))


def _differences(path: str, recorded: Any, now: Any) -> list[tuple[str, str]]:
    if isinstance(recorded, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*recorded, *now]))
        found = []
        for key in keys:
            found += _differences(f"{path}.{key}".strip("."), recorded.get(key), now.get(key))
        # the order of arms numbers the episodes
        if not found and list(recorded) != list(now):
            found = [(path, f"{path}: in the order {list(recorded)}, now {list(now)}")]
        return found
    if recorded == now:
        return []
    if isinstance(recorded, list) and isinstance(now, list) and len(str(recorded)) > 200:
        return [(path, f"{path}: {len(recorded)} entries recorded, {len(now)} now, not the same")]
    return [(path, f"{path}: {recorded!r} recorded, {now!r} now")]


def _plain(value: Any) -> Any:
    """The value as it reads back from JSON."""
    return json.loads(json.dumps(value, default=str))


@cache
def _commit() -> str | None:
    """Commit of the checkout that this package is imported from, "-dirty" after it where files differ from it."""
    root = Path(hooked_vla.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
