import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from episodes import check_conventions, check_neighbours, expert_episode, require
from experimenting import check_experiments
from recorded import check_closed_loop, check_demonstration

require("libero", "libero")

from hooked_vla.rollouts.libero import MAX_STEPS, SUITES, LiberoEnv  # noqa: E402
from hooked_vla.rollouts.libero_files import ASSETS_REPO, ASSETS_VARIABLE, missing_files, package_folder  # noqa: E402
from hooked_vla.rollouts.sweep import run_rollouts  # noqa: E402

needs_assets = pytest.mark.skipif(
    not os.environ.get(ASSETS_VARIABLE), reason=f"{ASSETS_VARIABLE} does not name a folder of LIBERO's data files"
)
BOWL_ON_PLATE, SOUP = "put_the_bowl_on_the_plate", "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
BOWL_IN_THE_MIDDLE = "pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate"


def test_suites_are_the_packages():
    for name, suite in SUITES.items():
        assert len(suite.tasks) == 10 and suite.max_steps == MAX_STEPS[name] and suite.n_starts == 50
    assert SUITES["libero_goal"].task(BOWL_ON_PLATE).instruction == "put the bowl on the plate"


def test_data_set_is_the_packages_own():
    source = (package_folder() / "utils" / "download_utils.py").read_text()
    assert f'HF_ASSETS_REPO_ID = "{ASSETS_REPO}"' in source


def test_import_never_asks(tmp_path):
    """The package asks on standard input where it finds no config; here that is closed."""
    code = "import hooked_vla.rollouts.libero as l; print(len(l.SUITES))"
    env = {key: value for key, value in os.environ.items() if key != "LIBERO_CONFIG_PATH"}
    env |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "4\n", done.stderr
    assert len(list(tmp_path.rglob("config.yaml"))) == 1


def test_files_that_lack_are_named(tmp_path, monkeypatch):
    task_file = package_folder() / "bddl_files" / "libero_goal" / f"{BOWL_ON_PLATE}.bddl"
    missing = missing_files(tmp_path, task_file)
    assert "scenes/libero_tabletop_base_style.xml" in missing
    assert "stable_scanned_objects/akita_black_bowl/akita_black_bowl.xml" in missing
    assert "stable_hope_objects/cream_cheese/cream_cheese.xml" in missing
    assert "articulated_objects/flat_stove.xml" in missing and "turbosquid_objects/wine_rack/wine_rack.xml" in missing
    monkeypatch.setenv(ASSETS_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"lack .*{BOWL_ON_PLATE}.*{ASSETS_REPO}"):
        SUITES["libero_goal"].make(BOWL_ON_PLATE, (), 32)


@needs_assets
def test_mesh_or_texture_that_lacks_is_named(tmp_path, monkeypatch):
    """Everything linked but one mesh, and then but one texture."""
    given = Path(os.environ[ASSETS_VARIABLE]).resolve()
    for file in (each for each in given.rglob("*") if each.is_file()):
        link = tmp_path / file.relative_to(given)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    monkeypatch.setenv(ASSETS_VARIABLE, str(tmp_path))
    mesh = next(
        file for kind in ("*.msh", "*.obj") for file in (tmp_path / "stable_hope_objects" / "cream_cheese").rglob(kind)
    )
    for lacking in (mesh, tmp_path / "textures" / "martin_novak_wood_table.png"):
        away = lacking.rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError, match=rf"lack .*{re.escape(lacking.name)}.*{BOWL_ON_PLATE}"):
            SUITES["libero_goal"].make(BOWL_ON_PLATE, (), 32)
        away.rename(lacking)


@needs_assets
def test_conventions():
    check_conventions(SUITES["libero_goal"], BOWL_ON_PLATE)


@needs_assets
def test_environments_draw_their_own_scene():
    goal, objects = SUITES["libero_goal"], SUITES["libero_object"]
    check_neighbours(goal.make(BOWL_ON_PLATE, goal.cameras, 32), objects.make(SOUP, objects.cameras, 48))


@needs_assets
def test_it_is_the_public_evaluation(monkeypatch):
    """State, start and image as the package's own environment gives them, images turned as its data sets are."""
    from libero.libero.envs.env_wrapper import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    monkeypatch.setenv("HOOKED_VLA_RENDER", "full")
    suite = SUITES["libero_goal"]
    env = suite.make(BOWL_ON_PLATE, suite.cameras, 64)
    assert isinstance(env, LiberoEnv)
    env.reset(seed=9)
    ours = env.reset(seed=52)[0]
    task_file = package_folder() / "bddl_files" / "libero_goal" / f"{BOWL_ON_PLATE}.bddl"
    reference = OffScreenRenderEnv(bddl_file_name=str(task_file), camera_heights=64, camera_widths=64)
    # the third of the fifty starts
    np.random.seed(2)
    reference.env.reset()
    reference.set_init_state(env.starts[2])
    for _ in range(10):
        theirs, *_ = reference.step([0, 0, 0, 0, 0, 0, -1])
    for action in np.random.default_rng(0).uniform(-1, 1, (3, 7)):
        state = [theirs["robot0_eef_pos"], quat2axisangle(theirs["robot0_eef_quat"]), theirs["robot0_gripper_qpos"]]
        assert np.array_equal(ours["state"], np.concatenate(state).astype(np.float32))
        assert np.array_equal(ours["pixels"]["agent"], theirs["agentview_image"][::-1, ::-1])
        assert np.array_equal(ours["pixels"]["wrist"], theirs["robot0_eye_in_hand_image"][::-1, ::-1])
        ours = env.step(action)[0]
        theirs, *_ = reference.step(action)


@needs_assets
def test_the_stove_goes_out_at_reset():
    """The simulator's models are kept across resets, and a burner's light is part of them."""
    env = SUITES["libero_goal"].make("turn_on_the_stove", ("agent",), 64)
    assert isinstance(env, LiberoEnv)
    before = env.reset(seed=3)[0]["pixels"]["agent"]
    env.simulator.object_states_dict["flat_stove_1"].set_joint(0.8)
    obs, reward, terminated, _, info = env.step(np.zeros(7))
    assert (reward, terminated, info["is_success"]) == (1.0, True, True)
    assert not np.array_equal(obs["pixels"]["agent"], before)
    assert np.array_equal(env.reset(seed=3)[0]["pixels"]["agent"], before)
    assert not env.step(np.zeros(7))[2]


@needs_assets
def test_numpys_generator_is_left_alone():
    env = SUITES["libero_goal"].make(BOWL_ON_PLATE, (), 32)
    np.random.seed(5)
    expected = np.random.RandomState(5).random(3)
    env.reset(seed=0)
    assert np.array_equal(np.random.random(3), expected)


@needs_assets
@pytest.mark.parametrize(
    ("suite", "task", "seed"),
    [
        ("libero_goal", BOWL_ON_PLATE, 0),
        ("libero_goal", "put_the_wine_bottle_on_the_rack", 0),
        ("libero_object", SOUP, 0),
        # a can stands where the palm would come down
        ("libero_object", "pick_up_the_cream_cheese_and_place_it_in_the_basket", 21),
        ("libero_spatial", BOWL_IN_THE_MIDDLE, 0),
    ],
)
def test_expert_solves(suite, task, seed):
    solved, n_steps = expert_episode(SUITES[suite], task, seed)
    assert solved and n_steps < MAX_STEPS[suite]


def test_task_without_an_expert_is_named(tmp_path):
    """Before anything is made or written."""
    expert = SUITES["libero_goal"].expert
    assert expert is not None
    with pytest.raises(ValueError, match=r"no scripted expert for 'turn_on_the_stove'.*put_the_bowl_on_the_plate"):
        expert("turn_on_the_stove")
    with pytest.raises(ValueError, match="no scripted expert for 'open_the_middle_drawer_of_the_cabinet'"):
        run_rollouts("expert", SUITES["libero_goal"], 10, 0, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@needs_assets
def test_policy_acts_in_closed_loop(tmp_path):
    check_closed_loop(SUITES["libero_goal"], BOWL_ON_PLATE, tmp_path)


@needs_assets
def test_demonstration_is_recorded(tmp_path):
    check_demonstration(SUITES["libero_spatial"], BOWL_IN_THE_MIDDLE, 3, tmp_path)


@needs_assets
def test_experiments_run(tmp_path):
    check_experiments(SUITES["libero_goal"], SUITES["libero_object"], tmp_path)
