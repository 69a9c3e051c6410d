"""`hooked-vla experiment`: list the experiments, and run one to its report."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from hooked_vla.rollouts import UNSEEN

experiment = typer.Typer(no_args_is_help=True, help="Experiments of the published studies, with their controls.")


@experiment.command("list")
def list_all() -> None:
    """List the experiments: what each asks, and on which models."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    with _missing_packages():
        from hooked_vla.rollouts.experiments.definition import list_experiments
    table = Table("id", "title", "question", "models", "rules")
    for each in list_experiments().values():
        table.add_row(
            each.id, escape(each.title), escape(each.question.strip()), "\n".join(each.models), str(len(each.rules))
        )
    Console().print(table)


@experiment.command("run")
def run_one(
    name: Annotated[str, typer.Argument(metavar="FILE", help="an id, as in `list`, or a TOML file")],
    model: Annotated[str | None, typer.Option(help="a checkpoint's name, folder or hub id; else FILE's first")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the results; a run that was interrupted goes on")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="few episodes, to see that everything works")] = False,
    seed: Annotated[int, typer.Option(help="of the first episode")] = UNSEEN,
    device: Annotated[str, typer.Option(help="where the model runs: cpu, cuda, ...")] = "cpu",
    executor: Annotated[str, typer.Option(help="local, or ray: the cluster of RAY_ADDRESS")] = "local",
    workers: Annotated[int, typer.Option(help="how many models run at a time, each with its environments")] = 1,
    n_envs: Annotated[int, typer.Option(help="episodes side by side in one batch")] = 8,
) -> None:  # fmt: skip
    """Run an experiment: a table, figures and a report that says which of its rules hold."""
    with _missing_packages():
        from hooked_vla.rollouts.cli import make_executor
        from hooked_vla.rollouts.executor import WorkerError
        from hooked_vla.rollouts.experiments.definition import find_experiment
        from hooked_vla.rollouts.experiments.publish import REPORT
        from hooked_vla.rollouts.experiments.run import run_experiment
        from hooked_vla.rollouts.jobs import ModelSource
        from hooked_vla.rollouts.settings import Options
    try:
        definition = find_experiment(name)
        source = ModelSource(model or definition.models[0], device=device)
        folder = out or Path("outputs/experiments") / f"{definition.id}-{Path(source.name).name}{'-quick' * quick}"
        with redirect_stdout(sys.stderr):
            outcome = run_experiment(
                definition, folder, source, quick, seed, make_executor(executor, workers), Options(n_envs),
                progress=True,
            )  # fmt: skip
    except (ValueError, FileNotFoundError, NotADirectoryError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    except (OSError, WorkerError) as error:
        typer.secho(getattr(error, "strerror", None) or str(error), err=True, fg="red")
        raise typer.Exit(1) from error
    for label in outcome.labels:
        typer.secho(label, fg="yellow")
    said = {True: ("holds", "green"), False: ("does not hold", "red"), None: ("not judged", "yellow")}
    for verdict in outcome.verdicts:
        word, colour = said[verdict.holds]
        typer.echo(f"{verdict.rule}: {typer.style(word, fg=colour)}: {verdict.measured}")
    typer.echo(f"wrote {folder / REPORT}")


@experiment.command("publish")
def publish_one(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    to: Annotated[Path, typer.Option(help="where results are kept, by experiment and model")] = Path("docs/results"),
) -> None:
    """Copy a run's report, tables and figures, without its episodes."""
    with _missing_packages():
        from hooked_vla.rollouts.experiments.publish import publish
    try:
        typer.echo(publish(run, to))
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error


class _missing_packages:
    """Around imports: what is not installed is a user's mistake, shown without a traceback."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModuleNotFoundError):
            raise typer.BadParameter(str(error)) from error
