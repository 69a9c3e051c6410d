"""`hooked-vla sae`: sparse autoencoders from activations on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_vla.rollouts.cli import failure

if TYPE_CHECKING:
    import torch

    from hooked_vla.sae.store import TokenStore

sae = typer.Typer(no_args_is_help=True, help="Sparse autoencoders on a policy's activations.")


@sae.command()
def collect(
    model: Annotated[str, typer.Option(help="a checkpoint's name, folder or hub id")],
    site: Annotated[list[str], typer.Option(help='where, as in "expert.blocks.*.hook_resid_post"; may come several '
                                                 "times")],
    out: Annotated[Path, typer.Option(help="folder of the store; one that was interrupted goes on")],
    suite: Annotated[str | None, typer.Option(help="where the policy acts: goal, object, ...")] = None,
    dataset: Annotated[Path | None, typer.Option(help="a LeRobotDataset that it is shown instead")] = None,
    episodes: Annotated[int | None, typer.Option(help="how many; of a data set, all where left out")] = None,
    seed: Annotated[int, typer.Option(help="episode i starts from this number + i")] = 0,
    tasks: Annotated[str | None, typer.Option(help="only these tasks of the suite, separated by commas")] = None,
    pooling: Annotated[str, typer.Option(help="token, mean (of all tokens) or segment_mean")] = "token",
    segments: Annotated[str | None, typer.Option(help='only these tokens: "language,image:*"')] = None,
    denoise_steps: Annotated[str | None, typer.Option(help='only these, as in "0,9"')] = None,
    keep: Annotated[str | None, typer.Option(help="dtype of what is kept: float32, bfloat16, ...; else the "
                                                  "model's")] = None,
    device: Annotated[str, typer.Option(help="where the model runs: cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the weights: float32 or bfloat16")] = "float32",
    n_envs: Annotated[int, typer.Option(help="episodes side by side in one batch")] = 8,
    n_action_steps: Annotated[int | None, typer.Option(help="steps from plan to plan; else the model's")] = None,
    cameras: Annotated[str | None, typer.Option(help="which camera stands for which of the model's: "
                                                     "camera1=agent,camera2=wrist")] = None,
) -> None:  # fmt: skip
    """Keep the activations of a policy on disk, to train autoencoders from and to look features up in."""
    with mistakes(), redirect_stdout(sys.stderr):
        from hooked_vla.rollouts.cli import camera_pairs
        from hooked_vla.rollouts.export_cli import read_numbers
        from hooked_vla.rollouts.jobs import ModelSource
        from hooked_vla.rollouts.sae import collect as work
        from hooked_vla.rollouts.settings import Options
        from hooked_vla.sae.rows import Capture

        steps = None if denoise_steps is None else frozenset(read_numbers(denoise_steps))
        capture = Capture(tuple(site), pooling, _names(segments), steps, _dtype(keep))
        options = Options(n_envs, n_action_steps=n_action_steps, cameras=camera_pairs(cameras))
        source = ModelSource(model, device=device, dtype=dtype)
        if (suite is None) == (dataset is None):
            raise ValueError("say either in which --suite the policy acts, or which --dataset it is shown")
        if dataset is not None:
            store = work.collect_dataset(source, dataset, capture, out, episodes, options, progress=True)
        elif suite is not None and episodes is not None:
            store = work.collect(
                source, suite, capture, episodes, seed, out, _names(tasks), options, progress=True
            )  # fmt: skip
        else:
            raise ValueError("say how many --episodes the policy is to act")
    _print_store(store)


@sae.command()
def train(
    site: Annotated[list[str], typer.Option(help='where, as in "expert.blocks.*.hook_resid_post"; may come several '
                                                 "times")],
    out: Annotated[Path, typer.Option(help="folder of the autoencoders; a run that was interrupted goes on")],
    model: Annotated[str, typer.Option(help="a checkpoint's name, folder or hub id")],
    suite: Annotated[str, typer.Option(help="where the policy acts meanwhile: goal, object, ...")] = "goal",
    store: Annotated[Path | None, typer.Option(help="what `collect` kept of the model; it then need not act")] = None,
    preset: Annotated[str, typer.Option(help="hooked, atlas, atlas-temporal, drvla or event")] = "hooked",
    change: Annotated[list[str] | None, typer.Option("--set", help="change one of the preset's settings, as in k=32 or "
                                                                   "architecture=topk; may come several times")] = None,
    steps: Annotated[int | None, typer.Option(help="of training; else the preset's")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="150 small steps, to see that everything works")] = False,
    seed: Annotated[int, typer.Option(help="of weights, and of the first episode")] = 0,
    device: Annotated[str, typer.Option(help="where model and training run: cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the model's weights: float32 or bfloat16")] = "float32",
    n_envs: Annotated[int, typer.Option(help="episodes side by side in one batch")] = 8,
) -> None:  # fmt: skip
    """Train sparse autoencoders of a policy's sites, all on one pass, and evaluate them on other episodes."""
    with mistakes(), redirect_stdout(sys.stderr):
        from dataclasses import replace

        from hooked_vla.rollouts.jobs import ModelSource
        from hooked_vla.rollouts.sae import training as work
        from hooked_vla.rollouts.settings import Options
        from hooked_vla.sae.store import TokenStore

        amount = work.QUICK if quick else work.Amount()
        amount = amount if steps is None else replace(amount, steps=steps)
        changes = work.read_changes(change or ())
        if store is not None:
            found = work.train_on_store(
                TokenStore(store), site, preset, model, amount, out, seed, changes, device, progress=True
            )  # fmt: skip
        else:
            source = ModelSource(model, device=device, dtype=dtype)
            found = work.train_on_policy(
                source, suite, site, preset, amount, out, seed, changes, Options(n_envs), progress=True
            )  # fmt: skip
    for each, evaluation in found:
        typer.echo(f"{each.config.site}: {evaluation}")
    typer.echo(f"wrote {out}")


@contextmanager
def mistakes() -> Iterator[None]:
    """A user's mistake is shown without a traceback, and what is not the command's fault is said in one line."""
    try:
        yield
    except (ValueError, KeyError, FileNotFoundError, NotADirectoryError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error.args[0]) if len(error.args) == 1 else str(error)) from error
    except OSError as error:
        raise failure(error) from error


def _names(text: str | None) -> tuple[str, ...] | None:
    """ "a,b" as names."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _dtype(name: str | None) -> "torch.dtype | None":
    """A floating dtype of torch by name. Raises ValueError for another name."""
    from hooked_vla.sae.store import NAMES

    known = {str(each).removeprefix("torch."): each for each in NAMES if each.is_floating_point}
    if name is not None and name not in known:
        raise ValueError(f"unknown dtype {name!r}; choose one of {sorted(known)}")
    return None if name is None else known[name]


def _print_store(store: "TokenStore") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("site", "rows", "width", "dtype", title=f"{len(store.episodes)} episodes in {store.folder}")
    for name in store.sites:
        table.add_row(name, f"{store.n_rows(name):,}", str(store.widths[name]), str(store.dtype(name))[6:])
    Console().print(table)
