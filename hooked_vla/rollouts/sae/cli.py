"""`hooked-vla sae`: sparse autoencoders from activations on."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_vla.rollouts import UNSEEN
from hooked_vla.rollouts.cli import failure
from hooked_vla.rollouts.sae.cli_tables import print_features, print_frame, print_loop, print_store, show_feature

if TYPE_CHECKING:
    import torch

    from hooked_vla.sae.autoencoder import SparseAutoencoder

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
    print_store(store)


@sae.command()
def train(
    site: Annotated[list[str], typer.Option(help='where, as in "expert.blocks.*.hook_resid_post"; may come several '
                                                 "times")],
    out: Annotated[Path, typer.Option(help="folder of the autoencoders; a run that was interrupted goes on")],
    model: Annotated[str | None, typer.Option(help="a checkpoint's name, folder or hub id; with --store, the "
                                                   "store's")] = None,
    suite: Annotated[str, typer.Option(help="where the policy acts meanwhile: goal, object, ...")] = "goal",
    store: Annotated[Path | None, typer.Option(help="what `collect` kept of the model; it then need not act")] = None,
    preset: Annotated[str, typer.Option(help="hooked, atlas, atlas-temporal, drvla or event")] = "hooked",
    change: Annotated[list[str] | None, typer.Option("--set", help="change one of the preset's settings, as in k=32 or "
                                                                   "architecture=topk; may come several times")] = None,
    steps: Annotated[int | None, typer.Option(help="of training; else the preset's")] = None,
    segments: Annotated[str | None, typer.Option(help='only these tokens, as it acts: "language,image:*"')] = None,
    denoise_steps: Annotated[str | None, typer.Option(help='only these, as it acts: "0,9"')] = None,
    quick: Annotated[bool, typer.Option("--quick", help="120 small steps, to see that everything works")] = False,
    seed: Annotated[int, typer.Option(help="of weights, and of the first episode")] = 0,
    device: Annotated[str, typer.Option(help="where model and training run: cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the model's weights: float32 or bfloat16")] = "float32",
    n_envs: Annotated[int, typer.Option(help="episodes side by side in one batch")] = 8,
) -> None:  # fmt: skip
    """Train sparse autoencoders of a policy's sites, all on one pass, and evaluate them on other episodes."""
    with mistakes(), redirect_stdout(sys.stderr):
        from dataclasses import replace

        from hooked_vla.rollouts.export_cli import read_numbers
        from hooked_vla.rollouts.jobs import ModelSource
        from hooked_vla.rollouts.sae import training as work
        from hooked_vla.rollouts.settings import Options
        from hooked_vla.sae.rows import Capture
        from hooked_vla.sae.store import TokenStore

        changes = work.read_changes(change or ())
        amount = work.quick_amount(preset, changes) if quick else work.Amount()
        if steps is not None and "steps" in changes:
            raise ValueError("say the steps once: --steps or --set steps")
        amount = amount if steps is None else replace(amount, steps=steps)
        denoised = None if denoise_steps is None else frozenset(read_numbers(denoise_steps))
        if store is not None:
            if segments is not None or denoised is not None:
                raise ValueError("a store has the tokens and denoise steps that it was collected with")
            found = work.train_on_store(
                TokenStore(store), site, preset, model, amount, out, seed, changes, device, progress=True
            )  # fmt: skip
        elif model is None:
            raise ValueError("say which --model acts, or in which --store its activations are")
        else:
            source = ModelSource(model, device=device, dtype=dtype)
            capture = Capture(tuple(site), segments=_names(segments), denoise_steps=denoised)
            found = work.train_on_policy(
                source, suite, capture, preset, amount, out, seed, changes, Options(n_envs), progress=True
            )  # fmt: skip
    for each, evaluation in found:
        typer.echo(f"{each.config.site}: {evaluation}")
    typer.echo(f"wrote {out}")


@sae.command()
def zoo(
    model: Annotated[str, typer.Argument(help="a policy that comes with the package")],
    out: Annotated[Path, typer.Option(help="folder of all such autoencoders; a run that was interrupted goes on")],
    seed: Annotated[int, typer.Option(help="of weights, and of the first episode")] = 0,
) -> None:
    """Train the autoencoders that come with the package again."""
    with mistakes(), redirect_stdout(sys.stderr):
        from hooked_vla.rollouts.sae.zoo import train_zoo

        found = train_zoo(model, out, seed=seed, progress=True)
    for each, evaluation in found:
        typer.echo(f"{each.config.site}: {evaluation}")
    typer.echo(f"wrote {out / model}")


@sae.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="a checkpoint's name, folder or hub id")],
    coder: Annotated[list[str], typer.Option("--sae", help="folder of an autoencoder or of a training run, or one that "
                                                           "comes with the package; may come several times")],
    episodes: Annotated[int, typer.Option(help="of each arm, spread evenly over the tasks")],
    out: Annotated[Path, typer.Option(help="folder of the results; a run that was interrupted goes on")],
    suite: Annotated[str, typer.Option(help="where the policy acts: goal, object, ...")] = "goal",
    seed: Annotated[int, typer.Option(help="episode i starts from this number + i; the default is apart from what "
                                           "autoencoders are trained on")] = UNSEEN,
    tasks: Annotated[str | None, typer.Option(help="only these tasks of the suite, separated by commas")] = None,
    pools: Annotated[str, typer.Option(help="token, mean (of all tokens), segment_mean")] = "token,mean",
    by_segment: Annotated[bool, typer.Option("--by-segment", help="also in each token segment by itself")] = False,
    denoise_steps: Annotated[str | None, typer.Option(help='also at each of these by itself, as in "0,9"')] = None,
    noise: Annotated[str, typer.Option(help="how long a direction of noise lasts: step or episode")] = "step",
    drop_negative: Annotated[bool, typer.Option("--drop-negative", help="of a top-k without ReLU, leave out features "
                                                                        "below zero, which edits cannot keep")] = False,
    device: Annotated[str, typer.Option(help="where the model runs: cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="of the weights: float32 or bfloat16")] = "float32",
    n_envs: Annotated[int, typer.Option(help="episodes side by side in one batch")] = 8,
    n_action_steps: Annotated[int | None, typer.Option(help="steps from plan to plan; else the model's")] = None,
    executor: Annotated[str, typer.Option(help="local, or ray: the cluster of RAY_ADDRESS")] = "local",
    workers: Annotated[int, typer.Option(help="how many models run at a time")] = 1,
) -> None:  # fmt: skip
    """Success with autoencoders in the loop, beside the identity and noise of the same size."""
    with mistakes(), redirect_stdout(sys.stderr):
        from hooked_vla.rollouts.cli import make_executor
        from hooked_vla.rollouts.export_cli import read_numbers
        from hooked_vla.rollouts.jobs import ModelSource
        from hooked_vla.rollouts.sae.hooked_sr import hooked_sr
        from hooked_vla.rollouts.settings import Options

        steps = () if denoise_steps is None else sorted(read_numbers(denoise_steps))
        saes = open_saes(coder)
        _warn_of_other_models(saes, model)
        found = hooked_sr(
            ModelSource(model, device=device, dtype=dtype), suite, saes, episodes, seed, out,
            _names(pools) or (), by_segment, steps, noise, drop_negative, _names(tasks),
            Options(n_envs, n_action_steps=n_action_steps), executor=make_executor(executor, workers), progress=True,
        )  # fmt: skip
    print_loop(found)
    typer.echo(f"wrote {out}")
    if not found.is_exact:
        typer.secho(
            "the identity changed episodes: what the other arms show is not the autoencoder's", err=True, fg="red"
        )
        raise typer.Exit(1)


@sae.command()
def index(
    store: Annotated[Path, typer.Option(help="what `collect` kept, of the autoencoder's site")],
    coder: Annotated[str, typer.Option("--sae", help="folder of the autoencoder, or one that comes with the package")],
    out: Annotated[Path, typer.Option(help="folder of the index; one that was interrupted goes on")],
    coefficients: Annotated[str, typer.Option(help="of the metric of generality: libero or droid")] = "libero",
    on: Annotated[float, typer.Option(help="above which a feature begins, for that metric")] = 0.1,
    memory: Annotated[str, typer.Option(help="that sorting and grouping may take")] = "2GB",
    device: Annotated[str, typer.Option(help="where activations are encoded: cpu, cuda, ...")] = "cpu",
) -> None:  # fmt: skip
    """Index an autoencoder's features: where they are active, what they go with, which are alike."""
    with mistakes(), redirect_stdout(sys.stderr):
        from hooked_vla.rollouts.sae.index import build_index
        from hooked_vla.sae.generality import PUBLISHED
        from hooked_vla.sae.store import TokenStore

        if coefficients not in PUBLISHED:
            raise ValueError(f"unknown coefficients {coefficients!r}; choose one of {list(PUBLISHED)}")
        own = _open_sae(coder)
        found = build_index(
            TokenStore(store), own.to(device), out, PUBLISHED[coefficients], on, memory=memory, progress=True
        )  # fmt: skip
    print_features(found, found.features(n=10))
    typer.echo(f"wrote {out}")


@sae.command()
def features(
    folder: Annotated[Path, typer.Argument(help="of an index that `index` made")],
    feature: Annotated[int | None, typer.Option(help="show this one: where it is largest, and what is like it")] = None,
    search: Annotated[str | None, typer.Option(help='by words of their descriptions: "grasp red"')] = None,
    sort: Annotated[str, typer.Option(help="density, general, maximum, coverage, ...")] = "density",
    n: Annotated[int, typer.Option(help="how many are listed")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:  # fmt: skip
    """Look features up: a list, those that a text finds, or one in full."""
    with mistakes():
        from hooked_vla.rollouts.sae.feature_index import FeatureIndex

        found = FeatureIndex(folder)
        if feature is not None and search is not None:
            raise ValueError("say either which --feature, or what to --search for")
        if feature is not None:
            show_feature(found, feature, n, as_json)
            return
        listed = found.features(sort, n) if search is None else found.search(search, n)
    if as_json:
        typer.echo(listed.to_json(orient="records"))
    else:
        print_features(found, listed)


@sae.command()
def steer(
    model: Annotated[str, typer.Option(help="a checkpoint's name, folder or hub id")],
    coder: Annotated[str, typer.Option("--sae", help="folder of the autoencoder, or one that comes with the package")],
    episodes: Annotated[int, typer.Option(help="of each arm, spread evenly over the tasks")],
    out: Annotated[Path, typer.Option(help="folder of the results; a run that was interrupted goes on")],
    feature: Annotated[int | None, typer.Option(help="add this one's direction, and take it out")] = None,
    rhos: Annotated[str, typer.Option(help="how much of it, in lengths of the token")] = "-1,-0.5,0.5,1",
    folder: Annotated[Path | None, typer.Option("--index", help="ablate more and more features of this index, the most "
                                                                "frequent first")] = None,
    concept: Annotated[str | None, typer.Option(help='those that tell a label first, as in "phase=grasp"')] = None,
    counts: Annotated[str, typer.Option(help="how many features are ablated")] = "1,4,16",
    phases: Annotated[str | None, typer.Option(help="only in plans made in these phases, separated by commas")] = None,
    segments: Annotated[str | None, typer.Option(help='only at these tokens: "language,image:*"')] = None,
    steps: Annotated[str | None, typer.Option("--denoise-steps", help='only at these, as in "0,9"')] = None,
    drop_negative: Annotated[bool, typer.Option("--drop-negative", help="of a top-k without ReLU, leave out features "
                                                                        "below zero, which edits cannot keep")] = False,
    suite: Annotated[str, typer.Option(help="where the policy acts: goal, object, ...")] = "goal",
    seed: Annotated[int, typer.Option(help="of what is drawn; episode i starts from this number + i, which is apart "
                                           "from what autoencoders are trained on")] = UNSEEN,
    tasks: Annotated[str | None, typer.Option(help="only these tasks of the suite, separated by commas")] = None,
    device: Annotated[str, typer.Option(help="where the model runs: cpu, cuda, ...")] = "cpu",
    n_envs: Annotated[int, typer.Option(help="episodes side by side in one batch")] = 8,
) -> None:  # fmt: skip
    """Edit features while the policy acts: a dose of one feature, or more and more of them ablated."""
    with mistakes(), redirect_stdout(sys.stderr):
        from hooked_vla.rollouts.export_cli import read_numbers
        from hooked_vla.rollouts.jobs import ModelSource
        from hooked_vla.rollouts.sae import steering as work
        from hooked_vla.rollouts.sae.feature_index import FeatureIndex
        from hooked_vla.rollouts.settings import Options

        if (feature is None) == (folder is None):
            raise ValueError("say either which --feature to add, or of which --index to ablate features")
        own = _open_sae(coder)
        _warn_of_other_models([own], model)
        where = {"tokens": _names(segments), "denoise": None if steps is None else sorted(read_numbers(steps))}
        if feature is not None:
            doses = [float(each) for each in _names(rhos) or ()]
            arms = work.dose_arms(own.config.site, own.direction(feature), doses, seed, **where)
        else:
            assert folder is not None
            ranked, alive = FeatureIndex(folder).ranking(concept)
            numbers = [int(each) for each in _names(counts) or ()]
            arms = work.titration_arms(own, ranked, alive, numbers, seed, drop_negative, **where)
        found = work.steer(
            ModelSource(model, device=device), suite, arms, episodes, seed, out, _names(phases), _names(tasks),
            Options(n_envs), progress=True,
        )  # fmt: skip
    shown = ["arm", "n", "success", "success_low", "success_high", "holm_p", "displacement", "cosine", "unchanged"]
    print_frame(f"steering {own.config.site}", found.table.filter(shown))
    if feature is not None:
        for axis, label in enumerate("xyz"):
            print_frame(f"end effector along {label} (m)", work.dose_response(found, axis))
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


def open_saes(names: Sequence[str]) -> "list[SparseAutoencoder]":
    """Autoencoders from their folders, from those of training runs (all that are in them), and from the package.

    Raises FileNotFoundError naming what there is, ValueError for files that are damaged.
    """
    from hooked_vla.sae.autoencoder import SparseAutoencoder
    from hooked_vla.sae.files import WEIGHTS

    found = []
    for name in names:
        inside = sorted(path.parent for path in Path(name).glob(f"*/{WEIGHTS}"))
        found += [SparseAutoencoder.from_pretrained(each) for each in inside or [name]]
    return found


def _open_sae(name: str) -> "SparseAutoencoder":
    """One autoencoder. Raises ValueError for a folder of several, and as `open_saes`."""
    found = open_saes([name])
    if len(found) > 1:
        raise ValueError(f"{name} has the autoencoders of {[each.config.site for each in found]}: name one's folder")
    return found[0]


def _warn_of_other_models(saes: "Sequence[SparseAutoencoder]", model: str) -> None:
    from hooked_vla.rollouts.sae.training import is_another

    if others := sorted({sae.config.model for sae in saes if is_another(sae.config.model, model)}):
        said = (
            f"these autoencoders are of {', '.join(others)}, not of {model}: what they call features may mean nothing"
        )
        typer.secho(said, err=True, fg="yellow")
