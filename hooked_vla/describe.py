"""What a model looks like, as tables: for the command line and the generated pages in docs/."""

import re
from dataclasses import dataclass

from torch import nn

from hooked_vla.hooks import names as hook_names
from hooked_vla.vla import HookedVLA


@dataclass(frozen=True)
class HookRow:
    """One line of a hook table, as text."""

    name: str
    shape: str
    dtype: str
    steps: str
    reaches: str
    meaning: str


def n_parameters(model: HookedVLA) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.net.parameters())


def hook_table(
    model: HookedVLA, names_filter: hook_names.NamesFilter = None, every_layer: bool = False
) -> list[HookRow]:
    """Rows for the selected points; layers that are alike share a row, their numbers in braces.

    Raises KeyError when the filter selects nothing.
    """
    sites = model.hook_points
    groups: dict[tuple[str, HookRow], list[int]] = {}
    for name in hook_names.resolve(names_filter, list(sites)):
        site = sites[name]
        pattern = name if every_layer else re.sub(r"\.blocks\.\d+\.", ".blocks.{}.", name)
        row = HookRow(
            name=pattern,
            shape="[" + ", ".join(map(str, site.shape)) + "]",
            dtype=str(site.dtype).removeprefix("torch."),
            steps=str(model.n_denoise_steps) if site.denoised else "1",
            # the last layer's dead ends would split every group: the row of a group says that there are some
            reaches="",
            meaning=site.meaning,
        )
        groups.setdefault((pattern, row), []).append(hook_names.layer(name) or 0)
    rows = []
    for (pattern, row), layers in groups.items():
        spelled = pattern.replace("{}", _ranges(layers), 1)
        members = [pattern.replace("{}", str(layer), 1) for layer in layers] if "{}" in pattern else [pattern]
        dead = [layer for layer, name in zip(layers, members, strict=True) if not sites[name].reaches_action]
        reaches = "yes" if not dead else "no" if len(dead) == len(layers) else f"all but {_ranges(dead)}"
        rows.append(HookRow(spelled, row.shape, row.dtype, row.steps, reaches, row.meaning))
    return rows


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "{0-2,5}", [0, 2, 4, 6] as "{0,2..6}"; one number as itself."""
    ordered = sorted(set(numbers))
    if (
        len(ordered) > 2
        and (step := ordered[1] - ordered[0]) > 1
        and ordered == list(range(ordered[0], ordered[-1] + 1, step))
    ):
        return f"{{{ordered[0]},{ordered[1]}..{ordered[-1]}}}"
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return text if text.isdigit() else f"{{{text}}}"


def hooks_markdown(model: HookedVLA) -> str:
    """One model's hook points as a Markdown section."""
    lines = [
        f"## {model.spec.name}",
        "",
        f"{model.spec.description}. {len(model.points)} points at the published size, "
        f"{model.n_denoise_steps} denoise steps.",
        "",
        "| hook point | shape | dtype | times a chunk | reaches the action | meaning |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row.name}` | {row.shape} | {row.dtype} | {row.steps} | {row.reaches} | {row.meaning} |"
        for row in hook_table(model)
    ]
    return "\n".join(lines) + "\n"


def models_markdown(model: HookedVLA) -> str:
    """One model as a Markdown section: what it is, its pathways, its dead ends, its published checkpoints."""
    spec = model.spec
    lines = [f"## {spec.name}", "", f"{spec.description}. Wiring read from {spec.source}.", ""]
    lines += ["| pathway | parameters | blocks | d_model | hook points |", "|---|---|---|---|---|"]
    lines += [
        f"| `{row.name}` | {row.parameters:,} | {row.blocks} | {row.d_model} | {row.points} |"
        for row in pathways(model)
    ]
    dead = ", ".join(f"`{name}`" for name in model.dead_ends) or "none"
    lines += [
        "",
        f"Dead ends, which no action depends on: {dead}.",
        "",
        "| checkpoint | what distinguishes it |",
        "|---|---|",
    ]
    lines += [f"| `{each.repo_id}` | {each.note} |" for each in spec.checkpoints]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class PathwayRow:
    """Sizes of one pathway; "–" where it has no such size."""

    name: str
    parameters: int
    blocks: str
    d_model: str
    points: int


def pathways(model: HookedVLA) -> list[PathwayRow]:
    """The pathways in the order of the network."""
    return [
        PathwayRow(
            name=name,
            parameters=sum(parameter.numel() for parameter in part.parameters()),
            blocks=str(len(blocks)) if isinstance(blocks := getattr(part, "blocks", None), nn.ModuleList) else "–",
            d_model=str(getattr(part, "d_model", "–")),
            points=sum(point.startswith(f"{name}.") for point in model.points),
        )
        for name, part in model.net.named_children()
    ]
