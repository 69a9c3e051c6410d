"""Checkpoints that fixtures hold as a recipe, because their weights are too large to keep, and published key lists."""

import json
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RECIPE = "weights_recipe.json"
_TEMPORARY: list[tempfile.TemporaryDirectory] = []


@cache
def checkpoint_folder(fixture: Path) -> Path:
    """The fixture's folder, or where it has a recipe a temporary one with the checkpoint that the recipe makes."""
    if not (fixture / RECIPE).is_file():
        return fixture
    _TEMPORARY.append(tempfile.TemporaryDirectory(prefix=f"{fixture.name}_"))
    folder = Path(_TEMPORARY[-1].name)
    write_checkpoint(fixture, folder)
    return folder


def write_checkpoint(fixture: Path, folder: Path) -> None:
    """config.json and model.safetensors of a recipe."""
    tensors = {each["name"]: make_tensor(each) for each in json.loads((fixture / RECIPE).read_text())}
    (folder / "config.json").write_text((fixture / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def make_tensor(recipe: dict) -> Tensor:
    """loc + scale · randn of a seed, positive where `abs`, or a literal value."""
    if "value" in recipe:
        value = torch.tensor(recipe["value"], dtype=getattr(torch, recipe["dtype"]))
        return value.expand(recipe["shape"]).clone()
    generator = torch.Generator().manual_seed(recipe["seed"])
    value = recipe["loc"] + recipe["scale"] * torch.randn(recipe["shape"], generator=generator)
    return value.abs() if recipe["abs"] else value


def read_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of the published checkpoint."""
    lines = (Path(__file__).parent / "golden" / "keys" / f"{name}.txt").read_text().splitlines()
    rows = (line.split() for line in lines)
    return {key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape in rows}
