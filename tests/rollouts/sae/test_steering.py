"""Steering: arms edit what they say, the sham changes nothing, and phases and doses are kept to."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from typer.testing import CliRunner

from hooked_vla.cli import app
from hooked_vla.interventions import AddRelative, EditArm
from hooked_vla.rollouts.records import read_steps
from hooked_vla.rollouts.sae import steering
from hooked_vla.rollouts.sae.steering import PhaseArm, PhaseWatcher, dose_arms, dose_response, steer, titration_arms
from hooked_vla.rollouts.settings import Options
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.presets import preset

# the suite without a simulator is beside the tests of the runner
sys.path.insert(0, str(Path(__file__).parent.parent))
from toy_suite import ToyEnv, tiny, toy_suite

SITE = "expert.blocks.0.hook_resid_post"
OPTIONS = Options(n_envs=4, n_action_steps=4, image_size=32, max_steps=8)


class TimedEnv(ToyEnv):
    """Early until step 4, late from then on; of the tasks, one is always late."""

    def _info(self):
        late = self.t >= 4 and self.task == "walk"
        return super()._info() | {"phase": "late" if late else "early"}


def suite():
    """Named as one whose states tell the end effector's place."""
    return toy_suite(name="goal", make=TimedEnv, tasks=toy_suite().tasks[:2], phases=("early", "late"))


def sae(k: int = 8) -> SparseAutoencoder:
    config = preset("hooked", "another", SITE, int(tiny("smolvla").hook_points[SITE].shape[-1]), architecture="topk",
                    n_features=60, k=k)  # fmt: skip
    return SparseAutoencoder(config).eval()


run = partial(steer, tiny("smolvla"), suite(), episodes=4, seed=3, options=OPTIONS)


def test_titration_takes_the_best_and_as_many_others():
    arms = {arm.name: arm.edits[0] for arm in titration_arms(sae(), [7, 3, 9, 1], range(0, 40), [1, 3], seed=0)}
    assert list(arms) == ["ranked 1", "random 1", "ranked 3", "random 3"]
    assert arms["ranked 3"].features == (7, 3, 9) and arms["ranked 1"].features == (7,)
    assert arms["random 3"].features[:1] == arms["random 1"].features
    assert not set(arms["random 3"].features) & {7, 3, 9} and all(edit.scale == 0 for edit in arms.values())
    again = titration_arms(sae(), [7, 3, 9, 1], range(0, 40), [1, 3], seed=0)
    assert again[3].edits[0].features == arms["random 3"].features
    for counts in ([0], [5], []):
        with pytest.raises(ValueError, match=r"counts must be in 1..4"):
            titration_arms(sae(), [7, 3, 9, 1], range(0, 40), counts, seed=0)


def test_doses_move_and_the_sham_does_not(tmp_path):
    direction = torch.randn(sae().config.d_model, generator=torch.Generator().manual_seed(0))
    arms = dose_arms(SITE, direction, [-0.5, 1.0], seed=0)
    assert [arm.name for arm in arms] == [
        "sham", "feature -0.5", "feature +1", "feature out", "random 0 -0.5", "random 0 +1", "random 0 out",
    ]  # fmt: skip
    found = run(arms, out=tmp_path / "s")
    table = found.table.set_index("arm")
    assert table.loc["sham", "unchanged"] == 4 and table.loc["baseline", "unchanged"] == 4
    assert table.loc["sham", "displacement"] == 0.0 and (found.shift("sham", 0) == 0).all()
    for name in ("feature +1", "random 0 +1", "feature out"):
        assert table.loc[name, "unchanged"] == 0 and table.loc[name, "displacement"] > 0
    states, arms_of = found.runs.states, found.runs.episodes["arm"]
    steps = {
        arm: [each[:, 0] for each, own in zip(states, arms_of, strict=True) if own == arm]
        for arm in ("baseline", "feature +1")
    }  # fmt: skip
    expected = [
        float((a[:n] - b[:n]).mean())
        for a, b in zip(steps["feature +1"], steps["baseline"], strict=True) for n in [min(len(a), len(b))]
    ]  # fmt: skip
    np.testing.assert_allclose(found.shift("feature +1", 0), expected)
    response = dose_response(found, 0).set_index("direction")
    shifts = [found.shift(arm, 0).mean() for arm in ("feature -0.5", "sham", "feature +1")]
    assert response.loc["feature", "spearman"] == pytest.approx(spearmanr([-0.5, 0, 1], shifts).statistic)
    assert response.loc["feature", "slope"] == pytest.approx(np.polyfit([-0.5, 0, 1], shifts, 1)[0])
    assert set(response.index) == {"feature", "random 0"}
    again = run(arms, out=tmp_path / "s")
    assert again.table.equals(found.table)
    assert (tmp_path / "s" / "steered.csv").read_text().startswith("suite,arm,")
    # the third number counts steps: nothing moves it
    assert np.isnan(dose_response(found, 2)["spearman"]).all()


def test_an_edit_in_a_phase_begins_with_the_plan_made_in_it(tmp_path):
    direction = torch.randn(sae().config.d_model, generator=torch.Generator().manual_seed(0))
    arm = EditArm("push", [AddRelative(SITE, direction, 2.0)])
    found = run([arm], out=tmp_path / "late", phases=["late"])
    steps = read_steps(tmp_path / "late" / "rollouts").to_pandas()
    episodes = found.runs.episodes
    for scene in episodes[episodes["arm"] == "push"].itertuples():
        other = episodes[(episodes["arm"] == "baseline") & (episodes["seed"] == scene.seed)].iloc[0]
        mine, theirs = (
            np.stack(list(steps[steps["episode"] == number]["action"])) for number in (scene.episode, other["episode"])
        )
        # the first plan, of four steps, is made before any phase is told
        assert np.array_equal(mine[:4], theirs[:4])
        assert np.array_equal(mine[4:], theirs[4:]) == (scene.task != "walk")
    everywhere = run([arm], out=tmp_path / "all")
    assert everywhere.table.set_index("arm").loc["push", "unchanged"] == 0
    with pytest.raises(ValueError, match="name at least one phase"):
        PhaseArm("p", arm, (), PhaseWatcher())
    with pytest.raises(ValueError, match=r"has no phases \['lat'\]; it has: early, late"):
        run([arm], out=tmp_path / "typo", phases=["early", "lat"])
    assert not (tmp_path / "typo").exists()


def test_mistakes_are_named(tmp_path):
    direction = torch.ones(sae().config.d_model)
    arms = dose_arms(SITE, direction, [1.0], seed=0)
    with pytest.raises(ValueError, match="not moves of an end effector"):
        steer(tiny("smolvla"), toy_suite(), arms, 2, 0, tmp_path / "x")
    with pytest.raises(ValueError, match="different numbers other than 0"):
        dose_arms(SITE, direction, [0.0, 1.0], seed=0)
    with pytest.raises(ValueError, match="must not be zero"):
        dose_arms(SITE, direction * 0, [1.0], seed=0)
    with pytest.raises(ValueError, match="arm 'feature \\+1'|arm 'sham'"):
        run(dose_arms(SITE, torch.ones(3), [1.0], seed=0), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_command_edits_where_it_is_told_and_warns_of_another_model(tmp_path, monkeypatch):
    sae().save_pretrained(tmp_path / "sae")
    asked = []
    monkeypatch.setattr(steering, "steer", lambda model, suite, arms, *rest, **more: asked.extend(arms) or 1 / 0)
    done = CliRunner().invoke(
        app, ["sae", "steer", "--model", "smolvla-tabletop", "--sae", str(tmp_path / "sae"), "--episodes", "1", "--out",
              str(tmp_path / "o"), "--feature", "3", "--segments", "action", "--denoise-steps", "9,0"],
    )  # fmt: skip
    assert isinstance(done.exception, ZeroDivisionError)
    for edit in (edit for arm in asked for edit in arm.edits):
        assert tuple(edit.tokens) == ("action",) and list(edit.denoise) == [0, 9]
    said = " ".join(done.output.split())
    assert "these autoencoders are of another, not of smolvla-tabletop" in said


def test_the_command_says_mistakes_in_one_line(tmp_path):
    sae().save_pretrained(tmp_path / "sae")
    several = tmp_path / "several"
    for name in ("a", "b"):
        sae().save_pretrained(several / name)

    def call(*arguments: str):
        return CliRunner().invoke(
            app, ["sae", "steer", "--model", "smolvla-tabletop", "--sae", str(tmp_path / "sae"), "--episodes", "1",
                  "--out", str(tmp_path / "o"), *arguments], terminal_width=200,
        )  # fmt: skip

    for arguments, said in (
        ((), "say either which --feature"),
        (("--feature", "1", "--sae", str(several)), "name one's folder"),
        (("--feature", "99"), "has no feature 99: its features are 0..59"),
        (("--feature", "1", "--rhos", "a"), "could not convert"),
        (("--feature", "1", "--phases", "grsp"), "no phases ['grsp']; it has: approach, descend, grasp"),
        (("--index", str(tmp_path)), "not an index"),
    ):
        done = call(*arguments)
        assert done.exit_code == 2 and said in " ".join(done.output.replace("│", "").split()), done.output
