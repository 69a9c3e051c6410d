"""`hooked-vla rollouts`: episodes of a model in a suite, with the success rate that came of it."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from hooked_vla.rollouts.executor import Executor
    from hooked_vla.rollouts.sweep import Rollouts

_HERE, _CLUSTER = "local", "ray"


def rollouts(
    model: Annotated[str, typer.Option(help="a checkpoint's name, folder or hub id; a model's name for random weights; "
                                            '"expert" for the suite\'s scripted one')],
    suite: Annotated[str, typer.Option(help="where it acts: goal, object, spatial, shift, style, ...")],
    episodes: Annotated[int, typer.Option(help="in all, spread evenly over the tasks")],
    seed: Annotated[int, typer.Option(help="episode i starts from this number + i")],
    tasks: Annotated[str | None, typer.Option(help="only these tasks of the suite, separated by commas")] = None,
    edits: Annotated[list[Path] | None, typer.Option(help="a file of edits: runs under them too, beside the unedited "
                                                          "ones, named after the file; may come several times")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the results; a run that was interrupted goes on")] = None,
    json_to: Annotated[str | None, typer.Option("--json", help='file for the numbers as JSON; "-": print them')] = None,
    size: Annotated[str, typer.Option(help="full or tiny, for a model's name")] = "full",
    device: Annotated[str, typer.Option(help="where the model runs: cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the weights: float32 or bfloat16")] = "float32",
    n_envs: Annotated[int, typer.Option(help="episodes side by side in one batch")] = 8,
    max_steps: Annotated[int | None, typer.Option(help="steps until an episode has failed; else the suite's")] = None,
    n_action_steps: Annotated[int | None, typer.Option(help="actions executed of a chunk; else the model's")] = None,
    image_size: Annotated[int | None, typer.Option(help="side of camera images; else as the model reads them")] = None,
    cameras: Annotated[str | None, typer.Option(help="which camera of the suite stands for which of the model's: "
                                                     "camera1=agent,camera2=wrist")] = None,
    unnorm_key: Annotated[str | None, typer.Option(help="which statistics, for checkpoints with several")] = None,
    threads: Annotated[int | None, typer.Option(help="torch threads a worker; else 1 for small models")] = None,
    executor: Annotated[str, typer.Option(help="local, or ray: the cluster of RAY_ADDRESS")] = _HERE,
    workers: Annotated[int, typer.Option(help="how many models run at a time, each with its environments")] = 1,
) -> None:  # fmt: skip
    """Run episodes of a model in a suite and say how many succeed."""
    # whatever is said on the way must not mix with the JSON
    with redirect_stdout(sys.stderr):
        try:
            from hooked_vla.interventions import EditArm, load_edits
            from hooked_vla.rollouts.arms import BASELINE
            from hooked_vla.rollouts.executor import WorkerError
            from hooked_vla.rollouts.jobs import ModelSource
            from hooked_vla.rollouts.settings import Options
            from hooked_vla.rollouts.sweep import EXPERT, run_rollouts
        except ModuleNotFoundError as error:
            raise typer.BadParameter(str(error)) from error
        try:
            options = Options(
                n_envs, max_steps, n_action_steps, image_size, camera_pairs(cameras), unnorm_key, threads=threads
            )
            arms = [BASELINE, *(EditArm(file.stem, load_edits(file)) for file in edits or ())]
            done = run_rollouts(
                EXPERT if model == EXPERT else ModelSource(model, size, device=device, dtype=dtype),
                suite, episodes, seed, None if tasks is None else [task.strip() for task in tasks.split(",")],
                arms, out=out, options=options, executor=make_executor(executor, workers), progress=True,
            )  # fmt: skip
        except (ValueError, FileNotFoundError, NotADirectoryError, ModuleNotFoundError) as error:
            raise typer.BadParameter(str(error)) from error
        except (OSError, WorkerError) as error:
            raise failure(error) from error
        typer.echo(str(done.timing), err=True)
    numbers = report(done)
    if json_to == "-":
        typer.echo(json.dumps(numbers, indent=1))
        return
    if json_to is not None:
        from hooked_vla.folders import write_json

        try:
            write_json(Path(json_to), numbers)
        except OSError as error:
            raise failure(error) from error
    _print_table(done)


def failure(error: Exception) -> typer.Exit:
    """To raise from an error that is not the command's fault, such as a full disk, once it is said."""
    text, file = getattr(error, "strerror", None) or str(error), getattr(error, "filename", None)
    typer.secho(text if file is None else f"{text}: {file}", err=True, fg="red")
    return typer.Exit(1)


def report(done: "Rollouts") -> dict[str, Any]:
    """A sweep's numbers: of its only arm, or of every arm by name."""
    manifest, arms = done.plan.manifest, done.summary
    settings = dict(manifest["settings"])
    settings |= {"seed": manifest["scenes"][0][1], "weights": manifest["model"]["weights"]}
    head = {"model": manifest["model"]["name"], "suite": manifest["suite"]["name"]}
    numbers = {
        arm: each.overall.to_json() | {"by_task": {task: rate.to_json() for task, rate in each.by_task.items()}}
        for arm, each in arms.items()
    }
    body = {"arms": numbers} if len(numbers) > 1 else {"arm": next(iter(numbers)), **next(iter(numbers.values()))}
    return {**head, **body, "settings": settings}


def make_executor(name: str, workers: int) -> "Executor":
    """Where a sweep runs, by the name that commands know. Raises ValueError for an unknown one."""
    from hooked_vla.rollouts.executor import LocalExecutor

    if name == _HERE:
        return LocalExecutor(workers)
    if name != _CLUSTER:
        raise ValueError(f"unknown executor {name!r}; executors: {[_HERE, _CLUSTER]}")
    from hooked_vla.rollouts.ray_executor import RayExecutor

    return RayExecutor(workers)


def camera_pairs(text: str | None) -> dict[str, str] | None:
    """ "a=b,c=d" as a mapping. Raises ValueError for anything else."""
    if text is None:
        return None
    pairs = [pair.split("=") for pair in text.split(",")]
    if bad := ["=".join(pair) for pair in pairs if len(pair) != 2 or not all(pair)]:
        raise ValueError(f"cameras: {bad[0]!r} is not of the form model_camera=suite_camera")
    return {theirs: ours for theirs, ours in pairs}


def _print_table(done: "Rollouts") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("arm", "task", "episodes", "success", "95 % interval")
    for arm, each in done.summary.items():
        for task, rate in {**each.by_task, "all": each.overall}.items():
            low, high = rate.interval
            table.add_row(arm, task, str(rate.episodes), f"{rate.success_rate:.1%}", f"{low:.1%} to {high:.1%}")
    Console().print(table)
