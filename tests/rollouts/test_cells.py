"""How a sweep is cut: every cell once, scenes in the same rows under every arm."""

from collections import Counter

import pytest

from hooked_vla.rollouts.cells import Scene, cells_of, cut_groups, spread_scenes

SCENES = tuple(Scene(f"task{i % 3}", i) for i in range(10))


@pytest.mark.parametrize(("n_tasks", "episodes"), [(12, 40), (3, 3), (5, 7), (4, 2), (1, 6)])
def test_scenes_spread_evenly_in_order_with_consecutive_seeds(n_tasks: int, episodes: int) -> None:
    tasks = [f"t{i}" for i in range(n_tasks)]
    scenes = spread_scenes(tasks, episodes, seed=100)
    assert [scene.seed for scene in scenes] == list(range(100, 100 + episodes))
    order = [tasks.index(scene.task) for scene in scenes]
    assert order == sorted(order)
    counts = Counter(order)
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(n_tasks)) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((["a"], 0, 0), "episodes must be at least 1"), ((["a"], 1, -1), "seed must"), (([], 1, 0), "no tasks")],
)
def test_bad_numbers_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spread_scenes(*arguments)
    with pytest.raises(ValueError, match="n_envs must be at least 1, got 0"):
        cut_groups(SCENES, ["a"], 0)


@pytest.mark.parametrize("n_envs", [1, 3, 4, 8, 10, 16, 25, 64])
def test_groups_hold_every_cell_once_and_fit(n_envs: int) -> None:
    arms = ["baseline", "edit", "other"]
    groups = cut_groups(SCENES, arms, n_envs)
    cells = [cell for group in groups for cell in group.cells]
    assert sorted(cells, key=lambda cell: cell.id) == list(cells_of(SCENES, arms))
    assert max(len(group.cells) for group in groups) <= n_envs
    assert [group.index for group in groups] == list(range(len(groups)))


def test_a_scene_has_the_same_row_and_company_under_every_arm() -> None:
    groups = cut_groups(SCENES, ["baseline", "edit"], 4)
    seeds = {arm: [[cell.seed for cell in group.cells] for group in groups if group.cells[0].arm == arm]
             for arm in ("baseline", "edit")}  # fmt: skip
    assert seeds["baseline"] == seeds["edit"] and all(len({c.arm for c in group.cells}) == 1 for group in groups)


def test_few_scenes_put_several_whole_arms_into_a_group() -> None:
    arms = [f"arm{i}" for i in range(5)]
    groups = cut_groups(SCENES[:3], arms, 8)
    assert [[cell.arm for cell in group.cells] for group in groups] == [
        ["arm0"] * 3 + ["arm1"] * 3, ["arm2"] * 3 + ["arm3"] * 3, ["arm4"] * 3
    ]  # fmt: skip
