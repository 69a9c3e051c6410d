"""`hooked-vla train`: make one of the shipped policies again."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    name: Annotated[str, typer.Argument(help="a shipped policy, such as smolvla-tabletop")],
    out: Annotated[Path, typer.Option(help="where everything goes; the same command goes on where it stopped")],
    seed: Annotated[int, typer.Option(min=0, help="of weights, demonstrations and batches")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="processes that record demonstrations")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="torch threads that train")] = 1,
    episodes: Annotated[int, typer.Option(min=1, help="of the evaluation, in each suite")] = 200,
) -> None:
    """Train a shipped policy: demonstrations, vision tower, imitation, corrections, evaluation, model card.

    What several policies share (frames, towers, demonstrations) is kept in OUT/shared.
    """
    import torch

    from hooked_vla.training.card import facts, write_card
    from hooked_vla.training.pipeline import (
        EVALUATION_SEED,
        Workshop,
        checks_while_training,
        claim,
        evaluate,
        make_policy,
    )
    from hooked_vla.training.recipes import RECIPES

    if name not in RECIPES:
        raise typer.BadParameter(f"unknown policy {name!r}; policies: {list(RECIPES)}")
    torch.set_num_threads(threads)
    recipe = RECIPES[name]
    shop = Workshop(out / "shared", out / name, workers, seed)
    try:
        claim(recipe, shop)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    model = make_policy(recipe, shop)
    rates = evaluate(model, recipe.evaluated, episodes, progress=True)
    folder = out / name / "checkpoint"
    write_card(folder, facts(name, recipe, model, seed, rates, EVALUATION_SEED, checks_while_training(shop)))
    typer.echo(f"{name}: {', '.join(f'{suite} {rate.success_rate:.1%}' for suite, rate in rates.items())}; in {folder}")
