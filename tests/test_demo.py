import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from public_checkpoints import make_observation
from starlette.testclient import TestClient
from unchecked import unchecked_shapes

from hooked_vla import HookedVLA, demo
from hooked_vla.atlas import run as atlas_run
from hooked_vla.atlas.app import Server, create_app
from hooked_vla.demo_goals import run_goals
from hooked_vla.rollouts.arms import Baseline
from hooked_vla.rollouts.injection import Told, ToldArm
from hooked_vla.rollouts.records import read_episodes
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.sweep import run_rollouts
from hooked_vla.rollouts.video import read_film


@dataclass(frozen=True)
class Run:
    out: Path
    results: dict
    printed: str


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("demo")
    with redirect_stdout(StringIO()) as printed, unchecked_shapes():
        results = demo.run_demo(out, seed=0, episodes=2)
    return Run(out, results, " ".join(printed.getvalue().split()))


@pytest.fixture
def pair(tiny_model: HookedVLA) -> demo.Pair:
    """Two observations that differ in everything, of equal token layout."""
    a, b = (make_observation(1, seed, [text]) for seed, text in enumerate(["push the cup", "lift a plate"]))
    with torch.no_grad():
        return demo.Pair(tiny_model, a, b, torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_files_are_whole_and_nothing_else_is_left(run):
    pictures = ["attention.png", "goals.png", "patch_effect.png"]
    assert sorted(path.name for path in run.out.iterdir()) == sorted([*pictures, "demo.json", "goals", "goals.mp4"])
    for name in pictures:
        pixels = imread(run.out / name)
        assert min(pixels.shape[:2]) > 800 and pixels.std() > 0.1
    assert json.loads((run.out / "demo.json").read_text()) == run.results


def test_told_another_goal_the_robot_goes_there(run):
    goals = run.results["goals"]
    assert (goals["A"]["reached"], goals["B"]["reached"]) == ("A", "B")
    # language tokens that have read nothing yet are the instruction itself
    assert goals["A, patched at block 0"]["reached"] == "B"
    assert goals["A, patched at block 0"]["path"] == goals["B"]["path"]
    assert run.results["success"]["episodes"] == 2 and "goal suite" in run.printed


def test_the_film_shows_three_robots_for_as_long_as_the_slowest_took(run):
    frames = list(read_film(run.out / "goals.mp4"))
    shown = ("A", "B", "A, patched at block 0")
    assert len(frames) == 1 + max(run.results["goals"][name]["env_steps"] for name in shown)
    assert frames[0].shape == (224, 3 * 224, 3)


@unchecked_shapes()
def test_the_record_is_of_rollouts_like_all_others(run):
    """Copies A and B are what the same policy does under the same arms anywhere else, to the bit."""
    arms = [Baseline("A"), ToldArm("B", [Told(run.results["instructions"]["B"])])]
    folder = run.out / demo.RECORD
    options = Options(n_envs=len(run.results["goals"]))
    again = run_rollouts(demo.MODEL, "goal", 1, demo.SEED, ["red-orange"], arms, options=options).episodes.to_pylist()
    recorded = read_episodes(folder).to_pylist()
    assert [row["arm"] for row in recorded] == list(run.results["goals"])
    for row in recorded:
        said = run.results["goals"][row["arm"]]
        assert (row["episode"], row["n_steps"]) == (said["episode"], said["env_steps"])
        ending = {"A": "success", "B": "terminated", "neither": "time limit"}[said["reached"]]
        assert row["ending"] == ending
    assert again[0] | {"episode": 0} == recorded[0]
    # here the goal of B ends the episode
    assert again[1]["n_steps"] > recorded[-1]["n_steps"] and again[1]["instruction"] == recorded[-1]["instruction"]


def test_its_folder_opens_with_the_patched_robot_beside_the_one_that_it_was(run, tmp_path):
    """Everything that two clicks from the first page show: the list, the pair, and the film of each."""
    opened = atlas_run.Run.open(run.out, cache=tmp_path)
    server = Server(8765)
    try:
        asked = TestClient(create_app(opened, server, live=False), base_url="http://127.0.0.1:8765")
        assert "&quot;home&quot;: &quot;episodes&quot;" in asked.get("/").text
        (listed,) = asked.get("/api/rollouts").json()
        assert listed["error"] is None and listed["path"] == demo.RECORD
        patched = asked.get(f"/api/rollouts/{listed['key']}/episode/{listed['edited']}").json()
        assert patched["arm"] == "A, patched at block 0" and "language tokens entering block 0" in patched["arm_text"]
        (baseline,) = [each for each in patched["cell"] if each["kind"] == "baseline"]
        assert (baseline["arm"], baseline["success"]) == ("A", True)
        assert [each["arm"] for each in patched["cell"]] == list(run.results["goals"])
        plain = asked.get(f"/api/rollouts/{listed['key']}/episode/{baseline['episode']}").json()
        assert plain["steps"]["state"][0] == patched["steps"]["state"][0] and plain["seed"] == patched["seed"]
        assert plain["steps"]["action"] != patched["steps"]["action"]
        for each in (plain, patched):
            film = asked.get(f"/api/rollouts/{listed['key']}/episode/{each['episode']}/film").json()
            assert film["error"] is None and film["n_frames"] == each["n_steps"] + 1
    finally:
        opened.close()


def test_the_last_line_says_how_to_look(run, monkeypatch):
    assert run.printed.endswith(f"hooked-vla atlas {run.out}")
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert "pip install 'hooked-vla[atlas]'" in demo.how_to_look(run.out)


def test_only_an_earlier_record_is_replaced(run, tmp_path):
    demo.check_replaceable(run.out / demo.RECORD)
    demo.check_replaceable(tmp_path / "nothing")
    (tmp_path / demo.RECORD).mkdir()
    (tmp_path / demo.RECORD / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something other"):
        demo.run_demo(tmp_path)
    assert (tmp_path / demo.RECORD / "notes.txt").read_text() == "mine"


def test_floors_are_exactly_zero(run):
    controls = run.results["controls"]
    assert controls["rerun_displacement"] == 0
    assert controls["identity_edit_displacement"] == 0
    assert controls["watching_patterns_displacement"] < 1e-4
    assert controls["other_noise_displacement"] > 0


def test_replay_exactly_where_the_patch_cuts_everything(run):
    patches = run.results["vlm_patches"] + run.results["expert_patches"]
    replays = [(patch["site"], patch["segment"]) for patch in patches if patch["outcome"] == "replay"]
    first, last = "vlm.blocks.0.hook_resid_pre", "expert.blocks.3.hook_resid_post"
    assert replays == [(first, "language"), (first, "all"), (last, "all")]
    for patch in patches:
        if patch["outcome"] == "replay":
            assert patch["displacement"] == pytest.approx(1) and patch["toward_b"] == pytest.approx(1)


def test_no_effect_exactly_where_nothing_reads_the_stream(run):
    patches = run.results["vlm_patches"] + run.results["expert_patches"]
    still = {(patch["site"], patch["segment"]) for patch in patches if patch["outcome"] == "no effect"}
    dead, first = "vlm.blocks.3.hook_resid_post", "vlm.blocks.0.hook_resid_pre"
    segments = {patch["segment"] for patch in run.results["vlm_patches"]}
    # what the runs share is the same when it enters
    assert still == {(dead, segment) for segment in segments} | {(first, s) for s in segments - {"language", "all"}}
    assert all(patch["displacement"] == 0 for patch in patches if (patch["site"], patch["segment"]) in still)
    assert all(patch["random_displacement"] == 0 for patch in patches if patch["site"] == dead)


def test_patching_where_tokens_enter_equals_swapping_the_input(run):
    assert run.results["controls"]["swap_minus_first_patch"] == 0
    assert run.results["input_swaps"]["language"]["displacement"] > 0
    swaps = {name: effect["outcome"] for name, effect in run.results["input_swaps"].items()}
    assert swaps.pop("all") == swaps.pop("language") == "replay"
    assert set(swaps.values()) == {"no effect"}, "the runs share everything but the instruction"


def test_cache_holds_what_was_predicted(run):
    assert run.results["cache"]["held_bytes"] == run.results["cache"]["predicted_bytes"] > 0


def test_attention_shares_are_fractions_and_grids_are_square(run):
    sides = {"vision": 4, "vlm": 4, "expert": 4}
    for reader, maps in run.results["attention"].items():
        for each in maps.values():
            grid = np.array(each["grid"])
            assert grid.shape == (sides[reader], sides[reader])
            # the mean of the multiples of uniform is the share over the uniform share
            assert grid.mean() == pytest.approx(each["share"] / each["uniform_share"], rel=1e-4)
    assert all(each["share"] == pytest.approx(1, rel=1e-5) for each in run.results["attention"]["vision"].values())


@unchecked_shapes()
def test_acting_repeats_bit_for_bit(run, tmp_path):
    model = HookedVLA.from_pretrained(demo.MODEL)
    again = run_goals(model, demo.MODEL, demo.GOALS, demo.SEED, tmp_path / "again")
    assert {each.copy.name: each.numbers() for each in again} == run.results["goals"]
    recorded, repeated = (
        {path.relative_to(folder): path.read_bytes() for path in folder.glob("*/*/*.parquet")}
        for folder in (run.out / demo.RECORD, tmp_path / "again")
    )
    assert recorded == repeated


def test_an_edit_towards_b_is_measured_along_the_way(pair):
    halfway = torch.lerp(pair.chunk_a.double(), pair.chunk_b.double(), 0.5)
    effect = pair.effect(halfway.to(pair.chunk_a.dtype))
    assert effect.displacement == pytest.approx(0.5, rel=1e-4)
    assert effect.toward_b == pytest.approx(0.5, rel=1e-4) and effect.outcome == "partial"
    assert pair.effect(pair.chunk_b).outcome == "replay" and pair.effect(pair.chunk_a).outcome == "no effect"


def test_unequal_layouts_are_refused(pair):
    longer = replace(pair.b, instruction=["a longer instruction"])
    with pytest.raises(ValueError, match="equal length"):
        demo.Pair(pair.model, pair.a, longer, pair.noise)
    with pytest.raises(ValueError, match="no difference"):
        demo.Pair(pair.model, pair.a, pair.a, pair.noise)


def test_missing_extra_is_named(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.startswith("matplotlib") or name == "hooked_vla.demo_figures"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("hooked_vla.demo_figures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install hooked-vla\[sim\]"):
        demo.run_demo(tmp_path)
    assert not any(tmp_path.iterdir())
