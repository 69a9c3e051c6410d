"""What a folder says of itself: going on with something else is refused, with the entry that differs."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_suite import toy_suite

from hooked_vla import HookedVLA
from hooked_vla.rollouts import manifest as manifests
from hooked_vla.rollouts.arms import BASELINE, FunctionArm
from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.manifest import claim_folder, describe_model, make_manifest, weight_hash
from hooked_vla.rollouts.records import MANIFEST, read_manifest
from hooked_vla.rollouts.settings import Options, settle

SCENES = tuple(Scene("walk", i) for i in range(30))
EDIT = FunctionArm("edit", (("vlm.*", lambda value, hook: value),), "nothing")


def make(scenes=SCENES, arms=(BASELINE, EDIT), weights: str = "abc", drawn: str = "full", **options) -> dict:
    suite = toy_suite(packages=("pytest",), quality=lambda: drawn)
    settings = replace(settle(Options(n_envs=4), "toy", None, suite), **options)
    model = {"name": "toy", "weights": weights, "spec": {"chunk": 8}}
    return make_manifest(model, suite, scenes, arms, settings, torch.device("cpu"))


def test_a_folder_is_claimed_once_and_recognised(tmp_path: Path) -> None:
    claim_folder(tmp_path / "new" / "run", make())
    path = tmp_path / "new" / "run" / MANIFEST
    written = path.read_bytes()
    claim_folder(path.parent, make())
    assert path.read_bytes() == written and read_manifest(path.parent) == make()
    found = read_manifest(path.parent)
    assert found["suite"]["render"] == "full" and found["versions"]["pytest"] == pytest.__version__
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["device"] == "cpu"
    assert found["scenes"][3] == ["walk", 3] and found["arms"]["edit"]["description"] == "nothing"
    assert found["suite"]["tasks"]["cliff"] == "go cliff" and found["settings"]["n_envs"] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_envs": 8}, "settings.n_envs: 4 recorded, 8 now"),
        ({"max_steps": 5, "threads": 2}, "settings.max_steps: 12 recorded, 5 now; settings.threads: 1 recorded, 2 now"),
        ({"weights": "abd"}, "model.weights: 'abc' recorded, 'abd' now"),
        ({"drawn": "fast"}, "suite.render: 'full' recorded, 'fast' now"),
        ({"arms": (BASELINE,)}, "arms.edit: .*'functions'.* recorded, None now"),
        ({"arms": (EDIT, BASELINE)}, r"arms: in the order \['baseline', 'edit'\], now \['edit', 'baseline'\]"),
        ({"scenes": SCENES[:29]}, "scenes: 30 entries recorded, 29 now"),
        ({"cameras": {"agent": "wrist"}}, "settings.cameras.agent: None recorded, 'wrist' now"),
    ],
)
def test_what_differs_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    claim_folder(tmp_path, make())
    written = (tmp_path / MANIFEST).read_bytes()
    with pytest.raises(ValueError, match=f"recorded with other settings: {message}"):
        claim_folder(tmp_path, make(**changes))
    assert (tmp_path / MANIFEST).read_bytes() == written


def test_other_versions_are_refused_and_other_machines_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    claim_folder(tmp_path, make())
    monkeypatch.setattr(manifests, "describe_machine", lambda device: {"device": "cpu", "cpu": "OTHER"})
    with caplog.at_level(logging.WARNING):
        claim_folder(tmp_path, make())
    assert "another machine" in caplog.text and "OTHER" in caplog.text
    monkeypatch.setattr(manifests, "version", lambda package: "0.0")
    with pytest.raises(ValueError, match=r"versions\.hooked-vla: '.*' recorded, '0.0' now"):
        claim_folder(tmp_path, make())


def test_folders_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no manifest.json, but holds \['thesis.txt'\]"):
        claim_folder(tmp_path, make())
    with pytest.raises(NotADirectoryError, match=r"thesis.txt is a file"):
        claim_folder(tmp_path / "thesis.txt", make())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is damaged"), (json.dumps({"format": "other 2"}), "format 'other 2', expected 'hooked-vla rollouts 1'")],
)
def test_a_damaged_manifest_stops_everything(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=message):
        claim_folder(tmp_path, make())
    assert (tmp_path / MANIFEST).read_text() == content


def test_the_hash_is_that_of_the_weights() -> None:
    first, again = (HookedVLA.from_spec("act", "tiny", seed=0) for _ in range(2))
    assert weight_hash(first) == weight_hash(again) != weight_hash(HookedVLA.from_spec("act", "tiny", seed=1))
    with torch.no_grad():
        next(again.net.parameters()).view(-1)[0] += 1e-3
    assert weight_hash(first) != weight_hash(again)
    assert weight_hash(first) != weight_hash(first.bfloat16())
    described = json.loads(json.dumps(describe_model("mine", again)))
    assert described["spec"]["chunk"] == 8 and described["name"] == "mine"
