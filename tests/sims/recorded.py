"""What the runner's tests of simulators share: small policies of any width, and episodes that are recorded."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner

from hooked_vla import HookedVLA, get_spec, registry
from hooked_vla.cli import app
from hooked_vla.rollouts.export import export_run
from hooked_vla.rollouts.records import read_episodes, read_steps
from hooked_vla.rollouts.suites import Suite
from hooked_vla.rollouts.sweep import run_rollouts

RUNNER = CliRunner(env={"COLUMNS": "400", "TERM": "dumb"})
N_STEPS = 10


def tiny_policy(folder: Path, suite: Suite, d_action: int) -> Path:
    """A checkpoint of random weights that sees all of the suite's cameras, its state and its instructions."""
    spec = get_spec("smolvla", "tiny")
    features = replace(
        spec.features, cameras=suite.cameras, d_state=suite.d_state, d_action=d_action, resize=(32, 32), max_text=96
    )
    spec = replace(spec, flow=replace(spec.flow, d_action=16, d_state=16), features=features)
    torch.manual_seed(0)
    HookedVLA.from_network(spec, registry.build_network(spec).eval()).save_pretrained(folder)
    return folder


def check_closed_loop(suite: Suite, task: str, folder: Path) -> None:
    """The command line runs a policy and writes what it did; one of another width is refused, and nothing written."""
    fits = tiny_policy(folder / "fits", suite, suite.d_action)
    command = ["rollouts", "--suite", suite.name, "--tasks", task, "--episodes", "2", "--seed", "5", "--n-envs", "2",
               "--max-steps", str(N_STEPS), "--json", "-"]  # fmt: skip
    result = RUNNER.invoke(app, [*command, "--model", str(fits), "--out", str(folder / "run")])
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    assert (numbers["suite"], numbers["episodes"]) == (suite.name, 2)
    assert numbers["settings"]["cameras"] == {camera: camera for camera in suite.cameras}
    rows, steps = (read(folder / "run").to_pylist() for read in (read_episodes, read_steps))
    assert [(row["task"], row["seed"], row["n_steps"]) for row in rows] == [(task, seed, N_STEPS) for seed in (5, 6)]
    assert [len(steps), len(steps[0]["state"]), len(steps[0]["action"])] == [2 * N_STEPS, suite.d_state, suite.d_action]
    states, actions = (np.array([step[name] for step in steps]) for name in ("state", "action"))
    assert np.isfinite(actions).all() and actions.std(axis=0).min() > 0 and (np.ptp(states, axis=0) > 0).any()

    wide = tiny_policy(folder / "wide", suite, suite.d_action + 1)
    result = RUNNER.invoke(app, [*command, "--model", str(wide), "--out", str(folder / "refused")])
    assert result.exit_code == 2 and not result.stdout
    message = f"has actions of width {suite.d_action + 1}, but the environments of the suite {suite.name!r} take "
    assert message + str(suite.d_action) in " ".join(result.output.replace("│", " ").split())
    assert not (folder / "refused").exists()


def check_demonstration(suite: Suite, task: str, seed: int, folder: Path) -> None:
    """The scripted expert's episode goes through the recorder, and comes out as a data set with images.

    The export runs it again from its seed and actions, and refuses states or rewards that differ in a bit.
    """
    done = run_rollouts("expert", suite, 1, seed, [task], out=folder / "run")
    [row] = done.episodes.to_pylist()
    assert row["success"] and row["ending"] == "success" and 1 < row["n_steps"] < suite.max_steps
    export_run(folder / "run", "lerobot", folder / "set", cameras=suite.cameras[:1], image_size=32)
    info = json.loads((folder / "set" / "meta" / "info.json").read_text())
    assert (info["total_episodes"], info["total_frames"], info["fps"]) == (1, row["n_steps"], suite.fps)
    assert info["features"]["action"]["shape"] == [suite.d_action]
    assert info["features"][f"observation.images.{suite.cameras[0]}"]["shape"][0] == 32
