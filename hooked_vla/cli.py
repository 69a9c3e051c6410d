"""The `hooked-vla` command: what models there are, what can be hooked in them, what a checkpoint is, the demo."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hooked_vla import registry
from hooked_vla.atlas.cli import atlas
from hooked_vla.describe import hook_table, hooks_markdown, n_parameters, pathways
from hooked_vla.rollouts.cli import rollouts
from hooked_vla.rollouts.experiments.cli import experiment
from hooked_vla.rollouts.export_cli import export
from hooked_vla.rollouts.sae.cli import sae
from hooked_vla.serving.cli import serve
from hooked_vla.training.cli import train
from hooked_vla.vla import HookedVLA
from hooked_vla.weights import SHIPPED, open_checkpoint, shipped_policies

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Interpretability for vision-language-action models."
)

app.command()(atlas)
app.command()(rollouts)
app.command()(export)
app.command()(serve)
app.command()(train)
app.add_typer(experiment, name="experiment")
app.add_typer(sae, name="sae")


class CommandError(typer.BadParameter):
    """A user's mistake, shown without a traceback."""


@app.command()
def models() -> None:
    """List the models."""
    console = Console()
    table = Table("model", "parameters", "description", "checkpoints")
    for name in registry.list_models():
        spec = registry.get_spec(name)
        repos = "\n".join(checkpoint.repo_id for checkpoint in spec.checkpoints)
        table.add_row(name, f"{spec.n_parameters / 1e6:,.0f} M", spec.description, repos)
    console.print(table)
    if shipped := shipped_policies():
        console.print(_policy_table(shipped))


@app.command()
def hooks(
    model: Annotated[str, typer.Argument(help="a model's name, or a checkpoint's folder or hub id")],
    size: Annotated[str, typer.Option(help="full or tiny, for a model's name")] = "full",
    match: Annotated[str | None, typer.Option(help='only these points, e.g. "expert.blocks.0.*"')] = None,
    every_layer: Annotated[bool, typer.Option(help="list every layer instead of one row for all")] = False,
    markdown: Annotated[bool, typer.Option(help="print Markdown, as in docs/hooks.md")] = False,
) -> None:
    """Print every hook point with shape, dtype and meaning."""
    console = Console()
    hooked = _load_skeleton(model, size)
    if markdown:
        typer.echo(hooks_markdown(hooked))
        return
    # a narrow terminal shows names and shapes whole and leaves the rest to docs/hooks.md
    columns = ["hook point", "shape", "dtype", "steps", "reaches action", "meaning"]
    table = Table(*(columns if console.width >= 140 else columns[:2]))
    for column in table.columns[:2]:
        column.no_wrap = True
    try:
        rows = hook_table(hooked, match, every_layer)
    except KeyError as error:
        raise CommandError(str(error.args[0])) from error
    for row in rows:
        cells = (row.name, row.shape, row.dtype, row.steps, row.reaches, row.meaning)
        table.add_row(*(escape(cell) for cell in cells[: len(table.columns)]))
    console.print(table)
    console.print(f"{len(hooked.points)} hook points in {hooked.spec.name}")


@app.command()
def info(checkpoint: Annotated[str, typer.Argument(help="a checkpoint's folder or hub id, or a model's name")]) -> None:
    """Say what a checkpoint is: family, sizes, cameras, normalisation, what loading uses and drops."""
    console = Console()
    hooked = _load_skeleton(checkpoint, "full")
    spec = hooked.spec
    console.print(f"[bold]{spec.name}[/bold] · {spec.description}")
    console.print(f"paper {spec.paper} · licence {spec.licence} · wiring read from {spec.source}")
    console.print(f"{n_parameters(hooked):,} parameters · {len(hooked.points)} hook points")
    table = Table("pathway", "parameters", "hook points", "blocks", "d_model")
    for row in pathways(hooked):
        table.add_row(row.name, f"{row.parameters:,}", str(row.points), row.blocks, row.d_model)
    console.print(table)
    features = spec.features
    console.print(f"cameras {list(features.cameras)} · state {features.d_state} · action {features.d_action}")
    console.print(f"{hooked.n_denoise_steps} denoise steps · normalisation {dict(features.normalization)}")
    dead = [name for name, site in hooked.hook_points.items() if not site.reaches_action]
    console.print(f"{len(dead)} dead ends, which no action depends on: {', '.join(hooked.dead_ends) or 'none'}")
    if hooked.load_report is not None:
        report = hooked.load_report
        console.print(f"checkpoint keys: {len(report.loaded)} loaded, dropped {list(report.dropped)}, "
                      f"statistics {list(report.statistics)}")  # fmt: skip


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where figures, numbers and episodes go")] = Path("outputs/demo"),
    seed: Annotated[int, typer.Option(help="seed of scenes, weights and noise")] = 0,
) -> None:
    """Run a hooked policy in a simulator: cache it, patch it, draw the effect."""
    from hooked_vla.demo import run_demo

    run_demo(out, seed=seed)


def _policy_table(names: list[str]) -> Table:
    """The policies that come with the package, as their cards have them."""
    cards = [json.loads((SHIPPED / name / "card.json").read_text()) for name in names]
    suites = list(dict.fromkeys(suite for card in cards for suite in card["success"]))
    table = Table("policy, in the package", "parameters", *suites, title="success on suites of the tabletop")
    for name, card in zip(names, cards, strict=True):
        rates = [card["success"].get(suite, {}).get("success_rate") for suite in suites]
        table.add_row(name, f"{card['parameters'] / 1e6:.1f} M", *("" if r is None else f"{r:.0%}" for r in rates))
    return table


def _load_skeleton(name: str, size: str) -> HookedVLA:
    """A model whose structure is real; weights are read only where `name` is a checkpoint."""
    if name in registry.list_models():
        try:
            spec = registry.get_spec(name, size)
        except ValueError as error:
            raise CommandError(str(error)) from error
        with torch.device("meta"):
            return HookedVLA.from_network(spec, registry.build_network(spec))
    try:
        open_checkpoint(name)
    except FileNotFoundError as error:
        raise CommandError(f"{error}\nknown models: {registry.list_models()}") from error
    try:
        return HookedVLA.from_pretrained(name)
    except (ValueError, FileNotFoundError) as error:
        raise CommandError(str(error)) from error
