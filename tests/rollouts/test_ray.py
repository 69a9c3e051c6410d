"""A sweep on a cluster of two nodes: the bytes of one process, also when a worker or a node is killed half-way."""

import logging
import sys
import time
from pathlib import Path

import cloudpickle
import psutil
import pytest
import toy_suite as toys
from test_executor import SCENES, files
from toy_suite import ToyEnv, toy_suite

ray = pytest.importorskip("ray", reason="Ray comes with the ray extra")
from ray.cluster_utils import Cluster  # noqa: E402

from hooked_vla.rollouts.arms import BASELINE, FunctionArm  # noqa: E402
from hooked_vla.rollouts.executor import LocalExecutor  # noqa: E402
from hooked_vla.rollouts.jobs import ModelSource  # noqa: E402
from hooked_vla.rollouts.ray_executor import RayExecutor  # noqa: E402
from hooked_vla.rollouts.settings import Options  # noqa: E402
from hooked_vla.rollouts.sweep import Plan, make_plan, run_plans  # noqa: E402


@pytest.fixture(scope="module")
def cluster():
    # workers cannot import what lies beside the tests
    for module in (toys, sys.modules[__name__]):
        cloudpickle.register_pickle_by_value(module)
    # the head takes no work: the driver is there
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    for module in (toys, sys.modules[__name__]):
        cloudpickle.unregister_pickle_by_value(module)


class SlowEnv(ToyEnv):
    """Takes long enough to be killed half-way."""

    def step(self, action):
        time.sleep(0.02)
        return super().step(action)


class Disturbed(RayExecutor):
    """Does something to the cluster when the first episode arrives."""

    def __init__(self, workers: int, disturb) -> None:
        super().__init__(workers)
        self.disturb, self.done, self.n_deaths = disturb, False, 0

    def pool(self, jobs, loaded, watchers):
        pool = super().pool(jobs, loaded, watchers)
        wait = pool.wait

        def wait_and_disturb():
            for event in wait():
                yield event
                self.n_deaths += event.kind == "died"
                if event.kind == "part" and not self.done:
                    self.done = True
                    self.disturb()

        pool.wait = wait_and_disturb
        return pool


def expert_plan() -> Plan:
    return make_plan("expert", toy_suite(make=SlowEnv), SCENES, options=Options(n_envs=3))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("alone")
    run_plans([expert_plan()], [folder], LocalExecutor())
    return files(folder)


def kill_worker(cluster: Cluster) -> None:
    """With a signal that it cannot see."""
    workers = [
        process for process in psutil.Process().children(recursive=True) if "ray::_RemoteWorker" in process.name()
    ]
    workers[0].kill()


def remove_node(cluster: Cluster) -> None:
    cluster.remove_node(next(node for node in cluster.worker_nodes))


@pytest.mark.parametrize("disturb", [kill_worker, remove_node])
def test_what_is_killed_is_done_again_by_others(cluster: Cluster, expected: dict, tmp_path: Path, disturb) -> None:
    executor = Disturbed(2, lambda: disturb(cluster))
    [done] = run_plans([expert_plan()], [tmp_path], executor)
    assert executor.done and executor.n_deaths == 1
    assert files(tmp_path) == expected and done.episodes["episode"].to_pylist() == list(range(20))


def test_models_and_functions_travel(cluster: Cluster, tmp_path: Path) -> None:
    arm = FunctionArm(
        "edit", (("expert.blocks.0.hook_resid_pre", lambda value, hook: value * 1.5),), "half as much again"
    )
    options = Options(n_envs=4, max_steps=6, n_action_steps=4)
    plan = make_plan(ModelSource("smolvla", "tiny"), toy_suite(), SCENES[:6], (BASELINE, arm), options)
    run_plans([plan], [tmp_path / "alone"])
    run_plans([plan], [tmp_path / "cluster"], RayExecutor(1))
    assert files(tmp_path / "alone") == files(tmp_path / "cluster")


def stumbler(task: str):
    def stumble(env: object):
        raise ArithmeticError("stumbled")

    return stumble


def test_errors_come_with_their_traceback(cluster: Cluster, tmp_path: Path) -> None:
    plan = make_plan("expert", toy_suite(expert=lambda task: stumbler(task)), SCENES[:2])
    with pytest.raises(RuntimeError, match="(?s)at episode 0 .*ArithmeticError: stumbled.*in the worker:.*in stumble"):
        run_plans([plan], [tmp_path], RayExecutor(1))
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        RayExecutor(0)
