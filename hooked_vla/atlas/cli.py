"""`hooked-vla atlas`: open a folder of results in the browser, or write it as a page that needs no server."""

from pathlib import Path
from typing import Annotated

import typer

NOTHING_SAID = (
    "say which folder to open: one that an experiment, rollouts, a feature index or steering was written to, or one "
    "that holds such folders"
)
TO_MAKE_SOME = "`hooked-vla demo` writes one to outputs/demo in half a minute, `hooked-vla experiment run` larger ones"


def atlas(
    run_dir: Annotated[Path | None, typer.Argument(help="an experiment, rollouts, a feature index, or a folder of such",
                                                   metavar="RUN_DIR", show_default=False)] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="on this machine alone; 0 for any that is free")] = 8765,
    browser: Annotated[bool, typer.Option(help="open the page")] = True,
    export: Annotated[Path | None, typer.Option(help="write a static copy into this folder instead")] = None,
    replays: Annotated[bool, typer.Option(help="into a copy, put films, attention and features' pictures, made by "
                                               "running episodes again")] = True,
    live: Annotated[bool, typer.Option(help="let the page run a local policy in a simulator")] = True,
) -> None:  # fmt: skip
    """Look at recorded results in the browser: models, episodes, features, experiments."""
    if run_dir is None:
        raise typer.BadParameter(f"{NOTHING_SAID}. {TO_MAKE_SOME}", param_hint="RUN_DIR")
    try:
        from hooked_vla.atlas.run import MAX_DEPTH, Run

        run = Run.open(run_dir)
        try:
            if run.empty:
                raise ValueError(
                    f"{run_dir} holds no experiment, rollouts, feature index or steering, down to {MAX_DEPTH} folders "
                    f"below it. {TO_MAKE_SOME}"
                )
            if export is not None:
                from hooked_vla.atlas.export import export_run

                written = export_run(run, export, replays, progress=True)
                typer.echo(f"wrote {written.files} files: open {export / 'index.html'}")
                for text in written.errors:
                    typer.secho(text, err=True, fg="yellow")
            else:
                from hooked_vla.atlas.serve import serve

                serve(run, port, live, browser, typer.echo)
        finally:
            run.close()
    except (FileNotFoundError, NotADirectoryError, ModuleNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:
        typer.secho(str(error), err=True, fg="red")
        raise typer.Exit(1) from error
