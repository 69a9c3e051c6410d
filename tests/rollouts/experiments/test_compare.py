"""The standard comparison on made-up episodes whose numbers are known, and its reading of recorded ones."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_vla import HookedVLA
from hooked_vla.analysis.statistics import mcnemar, wilson_interval
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.compare import (
    COLUMNS,
    RERUN,
    Runs,
    action_normalizer,
    by_task,
    compare,
    join,
    layout_of,
    mean_with_interval,
    override,
    read_runs,
    summarise_override,
)
from hooked_vla.rollouts.records import read_steps
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.sweep import run_rollouts

LAYOUT = layout_of("goal")
TASKS = ("red-orange", "blue-cyan", "green-purple")


def normalize(actions: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(actions, dtype=torch.float32)


def made_up(arms: dict[str, tuple[list[bool], float]], n_steps: int = 6, suite: str = "goal") -> Runs:
    """Episodes of every arm: whether each succeeds, and how far (metres) its path lies from the baseline's along y.

    All go along x at 1 cm a step; longer by two steps where they fail.
    """
    rows, states, actions, chunks = [], [], [], []
    for arm, (wins, aside) in arms.items():
        for i, won in enumerate(wins):
            steps = n_steps + 2 * (not won)
            rows.append({"suite": suite, "arm": arm, "task": TASKS[i % 3], "seed": i, "success": won})
            path = np.zeros((steps + 1, 4))
            path[:, 0], path[:, 1] = 0.01 * np.arange(steps + 1), aside
            states.append(path)
            act = np.zeros((steps, 4))
            act[:, 0] = 1
            act[4:, 1] = 100 * aside
            actions.append(act)
            chunks.append(np.arange(steps) // 4)
    return Runs(pd.DataFrame(rows), states, actions, chunks)


WINS = [True] * 12
FEWER = [True] * 4 + [False] * 8


def table_of(arms: dict, **options) -> pd.DataFrame:
    return compare(made_up(arms), LAYOUT, normalize, **options).set_index("arm")


def test_every_number_of_a_row_is_the_one_that_it_says() -> None:
    found = table_of({"baseline": (WINS, 0.0), "moved": (FEWER, 0.02), "rerun": (WINS, 0.001)})
    assert list(found.reset_index().columns) == sorted(COLUMNS, key=["arm", *COLUMNS].index)
    row = found.loc["moved"]
    assert (row["n"], row["n_tasks"], row["success"], row["baseline_success"]) == (12, 3, 4 / 12, 1)
    assert (row["success_low"], row["success_high"]) == wilson_interval(4, 12)
    assert row["difference"] == pytest.approx(-8 / 12)
    assert row["difference_low"] <= row["difference"] <= row["difference_high"] < 0
    assert row["mcnemar_p"] == row["holm_p"] == mcnemar(FEWER, WINS).p_value == pytest.approx(2 / 2**8)
    # over the 7 states that both have, 2 cm apart
    assert row["displacement"] == pytest.approx(0.02) and row["floor"] == pytest.approx(0.001)
    # four steps along x in the first chunk; then at an angle whose tangent is 2
    assert row["first_cosine"] == pytest.approx(1)
    assert row["cosine"] == pytest.approx((4 + 2 / 5**0.5) / 6)
    assert [row[flag] for flag in ("zero_effect_1pp", "zero_effect_10pp", "zero_effect", "floor_effect")] == [False] * 4


def test_the_baseline_is_compared_with_nothing_and_the_rerun_is_not_tested() -> None:
    found = table_of({"baseline": (WINS, 0.0), "moved": (FEWER, 0.02), "rerun": (FEWER, 0.001)})
    base = found.loc["baseline"]
    assert base["difference"] == 0 and base["displacement"] == 0 and np.isnan(base["mcnemar_p"])
    assert all(base[flag] is pd.NA for flag in ("zero_effect_1pp", "zero_effect", "floor_effect"))
    assert np.isnan(found.loc["rerun", "mcnemar_p"]) and found.loc["rerun", "zero_effect"] is pd.NA
    # were the rerun's a test, Holm would double the other's
    assert found.loc["moved", "holm_p"] == found.loc["moved", "mcnemar_p"]


def test_holm_counts_the_arms_of_all_suites() -> None:
    arms = {"baseline": (WINS, 0.0), "a": (FEWER, 0.0), "b": (WINS, 0.0), "rerun": (WINS, 0.0)}
    both = join(made_up(arms), made_up(arms, suite="object"))
    found = compare(both, LAYOUT, normalize).set_index(["suite", "arm"])
    assert found.loc[("goal", "a"), "holm_p"] == pytest.approx(4 * found.loc[("goal", "a"), "mcnemar_p"])
    assert found.loc[("goal", "b"), "holm_p"] == 1


@pytest.mark.parametrize(
    ("aside", "wins", "expected"),
    [
        # ours, 1 pp, 10 pp: equal success, but the arm moves otherwise by more than twice the floor
        (0.0021, WINS, (False, True, True)),
        (0.0019, WINS, (True, True, True)),
        # one episode of 12 less: not significant, but more than 1 pp, and less than 10
        (0.0019, [False] + [True] * 11, (True, False, True)),
        (0.0019, FEWER, (False, False, False)),
    ],
)
def test_the_three_definitions_of_no_effect_differ(aside: float, wins: list, expected: tuple) -> None:
    row = table_of({"baseline": (WINS, 0.0), "a": (wins, aside), "rerun": (WINS, 0.001)}).loc["a"]
    assert (row["zero_effect"], row["zero_effect_1pp"], row["zero_effect_10pp"]) == expected


def test_bits_that_are_the_same_are_no_effect_where_the_floor_is_zero() -> None:
    found = table_of({"baseline": (WINS, 0.0), "a": (WINS, 0.0), "b": (WINS, 1e-9), "rerun": (WINS, 0.0)})
    assert bool(found.loc["a", "zero_effect"]) and not bool(found.loc["b", "zero_effect"])


def test_a_baseline_that_fails_makes_a_floor_effect_and_no_floor_leaves_ours_open() -> None:
    poor = [False, False, *[True] * 10]
    found = table_of({"baseline": (poor, 0.0), "a": (poor, 0.0)}, floor=None)
    assert bool(found.loc["a", "floor_effect"]) and found.loc["a", "zero_effect"] is pd.NA
    assert np.isnan(found.loc["a", "floor"])
    with pytest.raises(ValueError, match=r"no episodes of the arm 'rerun' in the suites \['goal'\]"):
        table_of({"baseline": (poor, 0.0), "a": (poor, 0.0)})


def test_only_episodes_of_one_start_are_compared() -> None:
    runs = made_up({"baseline": (WINS[:3], 0.0), "a": (WINS, 0.0)})
    with pytest.raises(
        ValueError, match=r"arm 'a' has the episode \('goal', 'red-orange', 3\), but the arm 'baseline'"
    ):
        compare(runs, LAYOUT, normalize, floor=None)
    with pytest.raises(ValueError, match="arm 'a' has the task 'red-orange' from seed 0 twice"):
        join(runs, made_up({"a": (WINS, 0.0)}))


def test_rows_by_task() -> None:
    found = by_task(made_up({"baseline": (WINS, 0.0), "a": (FEWER, 0.0)})).set_index(["arm", "task"])
    row = found.loc[("a", "red-orange")]
    # episodes 0, 3, 6, 9, of which the first four of all succeed
    assert (row["n"], row["success"]) == (4, 0.5)
    assert (row["success_low"], row["success_high"]) == wilson_interval(2, 4)


def test_means_without_clusters_to_resample_have_no_interval() -> None:
    mean, low, high = mean_with_interval([1.0, 3.0], ["a", "a"])
    assert mean == 2 and np.isnan(low) and np.isnan(high)
    assert np.isnan(mean_with_interval([], [])).all()
    assert mean_with_interval([1.0, 3.0], ["a", "b"])[1:] == (1.0, 3.0)


def test_overrides_by_all_definitions() -> None:
    """The source goes right and ends at x = 1, the destination goes up; one arm follows each, one ends halfway."""
    ends = {"source": (1, 0), "destination": (0, 1), "like_source": (0.9, 0), "halfway": (0.5, 0.5), "keeps": (0, 1)}
    rows = [{"suite": "goal", "arm": a, "task": "t", "seed": 0, "success": a == "keeps"} for a in ends]
    states = [np.array([[0, 0, 0, 0], [x, y, 0, 0]], float) for x, y in ends.values()]
    actions = [np.array([[x, y, 0, 1]], float) for x, y in ends.values()]
    runs = Runs(pd.DataFrame(rows), states, actions, [np.zeros(1, int)] * 5)
    source, destination = runs.row("source", "t", 0), runs.row("destination", "t", 0)
    triples = [(runs.row(arm, "t", 0), source, destination) for arm in ("like_source", "halfway", "keeps")]
    found = override(runs, triples, LAYOUT, normalize).set_index("arm")
    assert found["three_way"].tolist() == ["source", "ambiguous", "destination"]
    assert found["ends_at_source"].tolist() == [True, False, False]
    assert found.loc["like_source", ["to_source", "cos_src", "cos_dst", "cos_src_dst"]].tolist() == pytest.approx(
        [0.1, 1, 0, 0]
    )
    assert found.loc["halfway", "endpoint_share"] == pytest.approx(0.5)
    total = summarise_override(override(runs, triples, LAYOUT, normalize).assign(arm="all")).iloc[0]
    assert (total["n"], total["source"], total["ambiguous"], total["destination"]) == (3, *[pytest.approx(1 / 3)] * 3)
    assert (total["source_low"], total["source_high"]) == wilson_interval(1, 3)
    assert total["success"] == pytest.approx(1 / 3)
    with pytest.raises(KeyError, match="0 episodes of arm 'keeps', task 't', seed 1; one was expected"):
        runs.row("keeps", "t", 1)


def test_layouts_are_of_suites_whose_actions_move_an_end_effector() -> None:
    assert layout_of("libero_goal").gripper == (6,) and layout_of("metaworld").moving == (0, 1, 2)
    with pytest.raises(ValueError, match="'aloha_insertion' are not moves of an end effector"):
        layout_of("aloha_insertion")


def test_recorded_episodes_are_read_as_they_were(tmp_path: Path) -> None:
    model = HookedVLA.from_pretrained("act-tabletop")
    options = Options(n_envs=2, max_steps=9)
    rollouts = run_rollouts(model, "object", 2, 700_000, arms=[BASELINE], out=tmp_path / "a", options=options)
    again = run_rollouts(model, "object", 2, 700_000, out=tmp_path / "b", options=Options(n_envs=1, max_steps=9))
    runs = join(read_runs(rollouts), read_runs(again, {"baseline": RERUN}))
    assert runs.episodes["arm"].tolist() == ["baseline"] * 2 + ["rerun"] * 2
    steps = read_steps(tmp_path / "a", [1]).to_pandas()
    assert np.array_equal(runs.actions[1], np.stack(list(steps["action"])))
    assert np.array_equal(runs.states[1][:-1], np.stack(list(steps["state"])))
    assert np.array_equal(runs.states[1][-1], runs.episodes["final_state"][1])
    assert np.array_equal(runs.chunks[1], steps["chunk"])
    row = compare(runs, layout_of("object"), action_normalizer(model)).set_index("arm").loc["rerun"]
    # rounding alone, far below a tenth of a millimetre
    assert row["displacement"] < 1e-4 and row["cosine"] > 0.9999
    with pytest.raises(ValueError, match=r"no arms \['none'\] to rename"):
        read_runs(rollouts, {"none": "x"})
    with pytest.raises(ValueError, match="not kept"):
        read_runs(run_rollouts(model, "object", 1, 0, options=Options(n_envs=1, max_steps=1)))


def test_actions_are_normalised_as_the_network_has_them() -> None:
    model = HookedVLA.from_pretrained("act-tabletop")
    from hooked_vla import Observation

    images = {camera: np.zeros((96, 96, 3), np.uint8) for camera in model.spec.features.cameras}
    actions = model(Observation(images, np.zeros(4, np.float32), ""))
    again = action_normalizer(model)(actions.chunk[0].detach().numpy())
    assert torch.allclose(again, actions.normalized[0], atol=1e-5)
