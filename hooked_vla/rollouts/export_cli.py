"""`hooked-vla export`: a folder of rollouts as a LeRobot data set, for Rerun, or as films."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hooked_vla.rollouts.cli import failure


def export(
    folder: Annotated[Path, typer.Argument(help="a folder that `hooked-vla rollouts --out` wrote")],
    to: Annotated[str, typer.Option(help="lerobot, rerun or mp4")],
    out: Annotated[
        Path, typer.Option(help="lerobot: the data set's folder; else a folder that gets a file an episode")
    ],
    episodes: Annotated[str | None, typer.Option(help='numbers, as in "0,3,10-19"; all where left out')] = None,
    cameras: Annotated[str | None, typer.Option(help="what to draw: agent,wrist; else what the policy saw")] = None,
    image_size: Annotated[int | None, typer.Option(help="side of the images; else what the policy saw")] = None,
    tolerance: Annotated[float, typer.Option(help="how far states may be from the record, 0: not at all")] = 0.0,
) -> None:
    """Export recorded episodes with images: each runs again from its seed and actions, and is checked."""
    console = Console()
    try:
        from hooked_vla.rollouts.export import export_run
        from hooked_vla.rollouts.replay import Episode, ReplayError

        def tell(episode: Episode) -> None:
            console.print(f"episode {episode.number}: {len(episode)} steps, {episode.instruction!r}", highlight=False)

        try:
            written = export_run(
                folder, to, out, None if episodes is None else read_numbers(episodes),
                None if cameras is None else cameras.split(","), image_size, tell, tolerance=tolerance,
            )  # fmt: skip
        except ReplayError as error:
            raise ValueError(str(error)) from error
    except (ValueError, KeyError, FileNotFoundError, FileExistsError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error.args[0]) if error.args else str(error)) from error
    except OSError as error:
        raise failure(error) from error
    console.print(
        f"wrote {written[0]}" + (f" and {len(written) - 1} more" if len(written) > 1 else ""), highlight=False
    )


def read_numbers(text: str) -> list[int]:
    """ "0,3,10-12" as [0, 3, 10, 11, 12].

    Raises ValueError for anything else.
    """
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f'episodes are numbers, as in "0,3,10-19"; got {text!r}')
        found += range(int(first), int(last or first) + 1)
    return found
