"""`hooked-vla rollouts` as a user meets it, on the tabletop: numbers on standard output, resumed after a kill."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hooked_vla.cli import app
from hooked_vla.interventions import Scale, save_edits
from hooked_vla.rollouts import manifest
from hooked_vla.rollouts.records import read_episodes, read_steps

runner = CliRunner(env={"COLUMNS": "160", "TERM": "xterm"})
RUN = ["rollouts", "--model", "smolvla", "--size", "tiny", "--suite", "object", "--tasks", "red,blue",
       "--episodes", "8", "--seed", "987654", "--n-envs", "2", "--max-steps", "10", "--image-size", "32",
       "--json", "-"]  # fmt: skip
MAIN = "from hooked_vla.cli import app; app()"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def _one_commit():
    """Somebody may commit while these tests run: here, and in the processes they start, there is no checkout."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_DIR", os.devnull)
        manifest._commit.cache_clear()
        yield
    manifest._commit.cache_clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A run that nothing disturbed: its folder and its numbers."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    result = runner.invoke(app, [*RUN, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def test_numbers_are_one_json_object(whole: tuple[Path, dict]) -> None:
    folder, numbers = whole
    assert (numbers["model"], numbers["suite"], numbers["arm"]) == ("smolvla", "object", "baseline")
    assert (numbers["episodes"], numbers["successes"], numbers["success_rate"]) == (8, 0, 0.0)
    assert numbers["interval"] == pytest.approx([0, 0.3244], abs=1e-4)
    assert {task: each["episodes"] for task, each in numbers["by_task"].items()} == {"red": 4, "blue": 4}
    settings = numbers["settings"]
    assert (settings["seed"], settings["n_envs"], settings["max_steps"]) == (987654, 2, 10)
    assert settings["cameras"] == {"agent": "agent", "wrist": "wrist"} and len(settings["weights"]) == 64
    rows = read_episodes(folder).to_pylist()
    assert [row["seed"] for row in rows] == list(range(987654, 987662)) and {row["n_steps"] for row in rows} == {10}
    assert [row["task"] for row in rows] == ["red"] * 4 + ["blue"] * 4


def test_a_killed_run_goes_on_to_the_same_bytes(whole: tuple[Path, dict], tmp_path: Path) -> None:
    folder, numbers = whole
    command = [sys.executable, "-c", MAIN, *RUN, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("out/episodes/*/*.parquet"))) < 3:
            assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    left = files(tmp_path / "out")
    recorded = [name for name in left if name.startswith("episodes/")]
    assert 3 <= len(recorded) < 8 and process.returncode == -signal.SIGKILL
    assert {name: content for name, content in left.items() if not name.endswith(".tmp")}.items() <= files(
        folder
    ).items()
    result = runner.invoke(app, [*RUN, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and json.loads(result.stdout) == numbers
    assert files(tmp_path / "out") == files(folder)


def test_files_of_edits_are_arms_beside_the_unedited_one(whole: tuple[Path, dict], tmp_path: Path) -> None:
    nothing, turned = tmp_path / "nothing.json", tmp_path / "turned.json"
    site = "expert.hook_velocity"
    save_edits([Scale(site, 1.0)], nothing)
    save_edits([Scale(site, -1.0, env=range(0, 100))], turned)
    folder = tmp_path / "out"
    result = runner.invoke(app, [*RUN, "--edits", str(nothing), "--edits", str(turned), "--out", str(folder)])
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    assert list(numbers["arms"]) == ["baseline", "nothing", "turned"]
    assert numbers["arms"]["baseline"] == {name: whole[1][name] for name in numbers["arms"]["baseline"]}
    assert json.loads((folder / "manifest.json").read_text())["arms"]["turned"]["edits"][0]["factor"] == -1.0
    episodes = read_episodes(folder).to_pylist()
    acted = {
        arm: read_steps(folder, [each["episode"] for each in episodes if each["arm"] == arm])["action"].to_pylist()
        for arm in numbers["arms"]
    }
    assert acted["nothing"] == acted["baseline"] != acted["turned"]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ('{"edit": "Scale", "site": "x"}', "missing factor"),
        (
            '{"edit": "Scale", "site": "no.site", "factor": 2}',
            "arm 'steered': edit 'Scale' (Scale): site: no",
        ),
        ('{"edit": "Add", "site": "vlm.blocks.0.hook_resid_post", "direction": [1, 2], "strength": 2}', "is 64 wide"),
    ],
)
def test_mistakes_in_files_of_edits_come_before_any_episode(tmp_path: Path, edits: str | None, message: str) -> None:
    file = tmp_path / "steered.json"
    if edits is not None:
        head = '{"format": "hooked-vla edits", "version": 1, "edits": ['
        file.write_text(edits if edits == "{" else head + edits + "]}")
    result = runner.invoke(app, [*RUN, "--edits", str(file), "--out", str(tmp_path / "out")])
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and message in said and not (tmp_path / "out").exists()
    assert "Traceback" not in said and not result.stdout


def test_edits_need_a_model(tmp_path: Path) -> None:
    save_edits([Scale("x", 1.0)], tmp_path / "steered.json")
    command = [*RUN, "--model", "expert", "--edits", str(tmp_path / "steered.json")]
    result = runner.invoke(app, command)
    assert result.exit_code == 2 and "edits need a model, and 'expert' is a script" in " ".join(
        result.output.replace("│", " ").split()
    )


def test_without_json_there_is_a_table_and_json_may_go_to_a_file(whole: tuple[Path, dict], tmp_path: Path) -> None:
    folder, numbers = whole
    to_file = [str(tmp_path / "numbers.json") if each == "-" else each for each in RUN]
    result = runner.invoke(app, [*to_file, "--out", str(folder)])
    assert "baseline" in result.stdout and "32.4%" in result.stdout and "blue" in result.stdout
    assert json.loads((tmp_path / "numbers.json").read_text()) == numbers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--suite": "nowhere"}, "unknown suite 'nowhere'; suites: ['goal'"),
        ({"--tasks": "red,mauve"}, "unknown task 'mauve' in the suite 'object'; tasks: ['red'"),
        ({"--episodes": "0"}, "episodes must be at least 1, got 0"),
        ({"--n-envs": "0"}, "n_envs must be at least 1, got 0"),
        ({"--seed": "-1"}, "seed must be at least 0"),
        ({"--model": "no-such-model"}, "neither a folder nor a checkpoint"),
        ({"--model": "xvla"}, "'xvla' has actions of width 20, but the environments of the suite 'object' take 4"),
        ({"--cameras": "agent"}, "'agent' is not of the form"),
        ({"--cameras": "agent=nose"}, "no cameras ['nose']"),
        ({"--executor": "cloud"}, "unknown executor 'cloud'; executors: ['local', 'ray']"),
        ({"--workers": "0"}, "workers must be at least 1"),
        ({"--n-envs": "3"}, "recorded with other settings: settings.n_envs: 2 recorded, 3 now"),
    ],
)
def test_mistakes_are_one_message_without_a_traceback(whole: tuple[Path, dict], changes: dict, message: str) -> None:
    arguments = dict(zip(RUN[1::2], RUN[2::2], strict=True)) | {"--out": str(whole[0])} | changes
    result = runner.invoke(app, ["rollouts", *(each for pair in arguments.items() for each in pair)])
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output and not result.stdout


def test_a_full_disk_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write = Path.write_bytes

    def fill(path: Path, content: bytes) -> int:
        if {"out", "episodes"} <= set(path.parts) or path.name.startswith(".numbers"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill)
    result = runner.invoke(app, [*RUN, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "no space left for episode 0" in result.output and not result.stdout
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.glob("out/episodes/*/*"))
    expert = ["rollouts", "--model", "expert", "--suite", "object", "--tasks", "red", "--episodes", "1", "--seed", "0"]
    file = tmp_path / "numbers.json"
    result = runner.invoke(app, [*expert, "--max-steps", "1", "--json", str(file)])
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and f"No space left on device: {file}" in said and not result.stdout
    assert not list(tmp_path.glob("*numbers*"))
