"""Steering runs of a feature: which there are, and how what the robot did followed the dose.

A run belongs to a feature where its arm "feature +0.5" adds that feature's decoder row at the index's site: by the
row's digest, which the run's manifest and the index both hold.
"""

import csv
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hooked_vla.analysis.statistics import cluster_bootstrap
from hooked_vla.atlas.routes import plain
from hooked_vla.atlas.run import RolloutFolder, Run, SteeringFolder
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.interventions.values import digest
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.compare import layout_of
from hooked_vla.rollouts.records import read_episodes, read_steps
from hooked_vla.rollouts.sae.feature_index import FeatureIndex
from hooked_vla.rollouts.sae.steering import OWN, ROLLOUTS, SHAM, TABLE

with needs_analysis_extra():
    import pandas as pd

AXES = ("x", "y", "z")
_COLUMNS = ("n", "success", "success_low", "success_high", "displacement", "displacement_low", "displacement_high",
            "cosine", "holm_p", "unchanged")  # fmt: skip
_MAX_TABLE = 2**20


def steering_of(run: Run, key: str, index: FeatureIndex, feature: int, read: bool = True) -> list[dict[str, Any]]:
    """The runs that steered a feature, with what came of every arm; read False: only which runs.

    rows: one an arm: direction ("feature", "random 0", "sham", "baseline"), rho (0 for the sham; None for taking the
    direction out and for the unedited policy), figures of the table, and shift: mean displacement along each axis from
    the unedited episode of the same start, metres, with a 95 % interval over tasks where there are two or more.
    error: why there are no shifts.
    """
    found = []
    for folder, rollouts in run.keep(f"steered {key}", lambda: _steered(run, index)).get(feature, ()):
        about: dict[str, Any] = {"key": folder.key, "path": run.shown(folder.path), "rollouts": rollouts.key}
        if read:
            about |= run.keep(f"doses {folder.key}", lambda each=(folder, rollouts): _doses(run, *each))
        found.append(about)
    return found


def _steered(run: Run, index: FeatureIndex) -> dict[int, list[tuple[SteeringFolder, RolloutFolder]]]:
    """Feature -> the runs that steered it."""
    found: dict[int, list[tuple[SteeringFolder, RolloutFolder]]] = {}
    by_path = {each.path: each for each in run.rollouts.values()}
    for folder in run.steering.values():
        rollouts = by_path.get(folder.path / ROLLOUTS)
        sha256 = None if rollouts is None else _direction(rollouts.manifest, index.site)
        if rollouts is None or sha256 is None:
            continue
        for feature in index.sql("SELECT feature FROM directions WHERE sha256 = ?", [sha256])["feature"].tolist():
            found.setdefault(feature, []).append((folder, rollouts))
    return found


def _direction(manifest: Mapping[str, Any], site: str) -> str | None:
    """Digest of what the arms "feature ..." add at a site; None for a run of another kind."""
    arms = manifest.get("arms")
    for name, about in arms.items() if isinstance(arms, dict) else ():
        if not name.startswith(f"{OWN} ") or not isinstance(about, dict):
            continue
        for edit in about.get("edits") or ():
            if isinstance(edit, dict) and edit.get("edit") == "AddRelative" and edit.get("site") == site:
                given = edit.get("direction")
                if isinstance(given, dict):
                    return str(given.get("sha256"))
                if isinstance(given, list) and given and all(isinstance(each, int | float) for each in given):
                    # a short one stands there by its numbers
                    return digest(torch.tensor(given, dtype=torch.float32))
    return None


def _doses(run: Run, folder: SteeringFolder, rollouts: RolloutFolder) -> dict[str, Any]:
    table = _table(run, folder)
    try:
        shifts, error = _shifts(rollouts), None
    except (ValueError, KeyError, OSError) as problem:
        shifts, error = {}, str(problem.args[0] if problem.args else problem).replace(f"{run.root}/", "")
    rows = []
    for line in table:
        direction, rho = _dose(line.get("arm", ""))
        figures = {name: _number(line.get(name)) for name in _COLUMNS}
        rows.append({"arm": line.get("arm"), "direction": direction, "rho": rho, **figures,
                     "shift": shifts.get(line.get("arm", ""))})  # fmt: skip
    suite = rollouts.manifest.get("suite")
    return {"suite": suite.get("name") if isinstance(suite, dict) else None, "rows": rows, "axes": list(AXES),
            "error": error, "file": run.shown(folder.path / TABLE)}  # fmt: skip


def _table(run: Run, folder: SteeringFolder) -> list[dict[str, str]]:
    file = run.inside(folder.path / TABLE)
    if file.stat().st_size > _MAX_TABLE:
        raise ValueError(f"{run.shown(file)} is larger than {_MAX_TABLE >> 20} MB")
    return list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8", errors="replace"))))


def _dose(arm: str) -> tuple[str, float | None]:
    """Direction and ρ of an arm of `dose_arms`."""
    if arm == SHAM:
        return SHAM, 0.0
    direction, _, dose = arm.rpartition(" ")
    if dose[:1] in ("+", "-"):
        return direction, _number(dose)
    return (direction, None) if dose == "out" else (arm, None)


def _number(text: str | None) -> float | None:
    try:
        return None if not text else plain(float(text))
    except ValueError:
        return None


def _shifts(rollouts: RolloutFolder) -> dict[str, list[dict[str, float | None]]]:
    """Arm -> its mean shift along each axis: the states of an episode less those of the unedited one of the same task
    and seed, mean over the steps that both have, last states included, then over episodes."""
    folder = rollouts.path
    if any(path.is_symlink() for path in folder.rglob("*")):
        raise ValueError("its folder of rollouts holds links, which are not followed")
    places = layout_of(str(rollouts.manifest["suite"]["name"])).state_position
    episodes = read_episodes(folder).to_pandas()
    table = read_steps(folder).select(["episode", "state"])
    states = pd.Series(list(table["state"].to_numpy())).groupby(table["episode"].to_numpy()).apply(list)
    paths = {
        (row["arm"], row["task"], row["seed"]): np.stack([*states[row["episode"]], row["final_state"]])[:, places]
        for row in episodes.to_dict("records")
    }  # fmt: skip
    found: dict[str, list[tuple[str, np.ndarray]]] = {}
    for (arm, task, seed), path in paths.items():
        base = paths.get((BASELINE.name, task, seed))
        if base is not None:
            n = min(len(path), len(base))
            found.setdefault(arm, []).append((task, (path[:n] - base[:n]).mean(0)))
    return {arm: [_summary([(task, float(shift[axis])) for task, shift in each]) for axis in range(len(AXES))]
            for arm, each in found.items()}  # fmt: skip


def _summary(shifts: list[tuple[str, float]]) -> dict[str, float | None]:
    tasks, values = zip(*shifts, strict=True)
    if len(set(tasks)) < 2:
        return {"mean": float(np.mean(values)), "low": None, "high": None}
    interval = cluster_bootstrap(list(values), tasks, n_resamples=2000)
    return {"mean": interval.estimate, "low": interval.low, "high": interval.high}
