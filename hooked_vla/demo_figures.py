"""How the demo shows what it measured: printed tables, figures and a film, all from the numbers in demo.json.

Figures are made without pyplot, so no window system and no global state is involved.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from rich import box
from rich.console import Console
from rich.table import Table

from hooked_vla.analysis.attention import CameraView
from hooked_vla.analysis.attention_figures import COLOURS, around_one, draw_overlay
from hooked_vla.demo_goals import Outcome, film_frames
from hooked_vla.hooks import HookSite
from hooked_vla.hooks.names import PATHWAYS, layer, leaf
from hooked_vla.rollouts.tabletop.env import FPS
from hooked_vla.rollouts.video import write_film

# what a pathway is shown by, where it has them
EXAMPLES = ("hook_tokens", "hook_out", "hook_resid_pre", "hook_pattern", "hook_velocity", "hook_actions")
READERS = {
    "vision": "image encoder\npatches read patches",
    "vlm": "VLM\nlanguage reads image tokens",
    "expert": "expert\nactions read image tokens",
}
DPI = 150


def print_hook_points(console: Console, sites: Mapping[str, HookSite]) -> None:
    """How many points each pathway has, and some of them with their shapes."""
    table = Table("pathway", "points", box=box.SIMPLE, pad_edge=False, title=f"{len(sites)} hook points")
    table.add_column("for example", no_wrap=True)
    table.add_column("shape")
    for pathway in PATHWAYS:
        mine = [site for site in sites.values() if site.pathway == pathway]
        firsts = {leaf(site.name): site for site in reversed(mine)}
        for i, site in enumerate(firsts[name] for name in EXAMPLES if name in firsts):
            shape = " ".join(str(size) for size in (["denoise"] if site.denoised else []) + list(site.shape))
            table.add_row("" if i else pathway, "" if i else str(len(mine)), site.name, shape)
    console.print(table)


def print_success(console: Console, success: Mapping[str, Any]) -> None:
    """How well the policy acts."""
    low, high = success["interval"]
    console.print(
        f"goal suite, starts never trained on: {success['successes']} of {success['episodes']} episodes "
        f"({success['success_rate']:.0%}, 95 % interval {low:.0%} to {high:.0%})\n"
    )


def print_goals(console: Console, goals: Mapping[str, Mapping[str, Any]]) -> None:
    """Which goal every copy of the robot reached."""
    table = Table("row", "told", "reached", "steps", box=box.SIMPLE, title="One scene, one robot, two goals")
    for name, each in goals.items():
        table.add_row(name, each["told"], each["reached"], str(each["env_steps"]))
    console.print(table)
    console.print("patched: language tokens entering that block are those of a run that was told B, at every plan\n")


def print_effects(console: Console, results: Mapping[str, Any]) -> None:
    """Controls, swapped inputs, and the patches of both streams."""
    controls = results["controls"]
    console.print("\nChange of run A's action chunk; 1 is the distance to run B's chunk.")
    console.print(f"floor, the same run again: {controls['rerun_displacement']:g}")
    console.print(f"floor, an edit that returns its input: {controls['identity_edit_displacement']:g}")
    console.print(f"attention patterns computed in the open: {controls['watching_patterns_displacement']:.1e}")
    console.print(f"another draw of the starting noise: {controls['other_noise_displacement']:.2f}")
    swaps = Table("given to A as input", "displacement", "toward B", "outcome", box=box.SIMPLE)
    for name, effect in results["input_swaps"].items():
        swaps.add_row(f"{name} of B", f"{effect['displacement']:.3f}", f"{effect['toward_b']:+.3f}", effect["outcome"])
    console.print(swaps)
    console.print(
        f"largest difference from patching the same tokens at VLM block 0: {controls['swap_minus_first_patch']:.1e}\n"
    )
    for stream, patches in (("VLM", results["vlm_patches"]), ("expert", results["expert_patches"])):
        console.print(f"{stream} residual stream of B patched into A: displacement, toward B")
        console.print(_patch_table(patches))
    console.print(
        "random: displacement by edits of the same length in random directions\n"
        "replay: every action is B's, bit for bit; the patch is a cut set, so it says nothing about this place\n"
        "no effect: every action is A's, bit for bit"
    )


def draw_attention(
    path: Path,
    results: Mapping[str, Any],
    images: Mapping[str, Any],
    views: Mapping[str, Mapping[str, CameraView]],
) -> None:
    """Both camera images of run A, and what of them three readers attend to.

    views: of the tokens that each reader reads, by camera.
    """
    attention = results["attention"]
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(attention), squeeze=False)
    for row, (camera, image) in enumerate(images.items()):
        axes[row, 0].imshow(image)
        axes[row, 0].set_ylabel(f"{camera} camera", fontsize=13)
        for column, (reader, maps) in enumerate(attention.items(), start=1):
            view = next(view for view in views[reader].values() if view.source == camera)
            draw_overlay(axes[row, column], np.asarray(image), np.array(maps[camera]["grid"]), view, _scale(maps))
            if reader != "vision":
                share, uniform = maps[camera]["share"], maps[camera]["uniform_share"]
                axes[row, column].set_xlabel(f"{share:.1%} of all attention (uniform: {uniform:.1%})", fontsize=10)
    for column, (reader, maps) in enumerate(attention.items(), start=1):
        axes[0, column].set_title(READERS[reader], fontsize=12)
        scale = ScalarMappable(_scale(maps), COLOURS)
        bar = figure.colorbar(scale, ax=axes[:, column], location="bottom", shrink=0.9, aspect=25)
        bar.set_label("attention to a token ÷ uniform attention", fontsize=10)
    axes[0, 0].set_title(f"run A\n“{results['instructions']['A']}”", fontsize=12)
    for each in axes.flat:
        each.set_xticks([])
        each.set_yticks([])
    figure.suptitle(
        f"Attention to the images: mean over layers, heads, queries and denoise steps\n{results['notice']}", fontsize=14
    )
    _save(figure, path)


def draw_effects(path: Path, results: Mapping[str, Any]) -> None:
    """Patches of the VLM as heat maps of segment × layer, patches of the expert as bars by layer."""
    vlm = results["vlm_patches"]
    figure = Figure(figsize=(15, 9.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 0.8))
    top = max(1.0, *(patch["displacement"] for patch in vlm))
    span = max(1.0, *(abs(patch["toward_b"]) for patch in vlm))
    panels = (
        ("displacement", "patch from B: displacement", "|patched − A| ÷ |B − A|", "viridis", Normalize(0, top)),
        ("toward_b", "patch from B: how far to B's actions", "0: A's own, 1: B's", "RdBu_r", Normalize(-span, span)),
        ("random_displacement", "control: random direction, same length", "|edited − A| ÷ |B − A|", "viridis",
         Normalize(0, top)),
    )  # fmt: skip
    for column, (key, title, unit, colours, norm) in enumerate(panels):
        axes = figure.add_subplot(grid[0, column])
        highest = _heat_map(axes, vlm, key, colours, norm)
        axes.set_title(title, fontsize=12)
        axes.set_xlabel("VLM residual stream entering block", fontsize=11)
        extend = "max" if norm.vmax is not None and highest > norm.vmax else "neither"
        figure.colorbar(axes.images[0], ax=axes, extend=extend).set_label(unit, fontsize=11)
    _bars(figure.add_subplot(grid[1, :2]), results["expert_patches"])
    _key(figure.add_subplot(grid[1, 2]), results)
    figure.suptitle(
        f"Residual stream patched from run B into run A: effect on the action chunk\n{results['notice']}",
        fontsize=14,
    )
    _save(figure, path)


def draw_goals(path: Path, results: Mapping[str, Any], image: np.ndarray) -> None:
    """The way of every copy's cup over the table, seen from above, on the scene as it was at the start."""
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    axes = figure.add_subplot()
    # the top camera looks straight down from 1.05 m with a field of view of 39 degrees (tabletop/scene.py)
    half = 1.05 * np.tan(np.deg2rad(39 / 2))
    axes.imshow(image, extent=(-half, half, -half, half), interpolation="nearest", alpha=0.8)
    goals = results["goals"]
    for i, (name, each) in enumerate(goals.items()):
        places = np.array(each["path"])
        colour = {"A": "black", "B": "white"}.get(name, colormaps["plasma"](i / len(goals)))
        style = {"linestyle": "--", "zorder": 3} if name == "B" else {}
        axes.plot(places[:, 0], places[:, 1], color=colour, linewidth=2.2, **style,
                  label=f"{name}: reached {each['reached']}")  # fmt: skip
        axes.plot(*places[-1, :2], "o", color=colour, markersize=7, markeredgecolor="black")
    axes.set_xlim(-half, half)
    axes.set_ylim(-half, half)
    axes.set_xlabel("x in metres")
    axes.set_ylabel("y in metres")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=11, facecolor="#d0c0a8")
    instructions = "\n".join(f"{name}: “{text}”" for name, text in results["instructions"].items())
    axes.set_title(f"Where the suction cup goes when language tokens of B enter run A\n{instructions}", fontsize=12)
    _save(figure, path)


def film_goals(path: Path, outcomes: Sequence[Outcome], folder: Path) -> None:
    """A film with three panels: A, B, and the copy patched deepest that reached B (else the first patched one).

    folder: the episodes' record. Whoever is done stands still until the slowest is.
    """
    by_name = {outcome.copy.name: outcome for outcome in outcomes}
    patched = [outcome for outcome in outcomes if outcome.copy.layer is not None]
    moved = [outcome for outcome in patched if outcome.reached == "B"]
    shown = [by_name["A"], by_name["B"], moved[-1] if moved else patched[0]]
    films = [[_labelled(outcome, frame) for frame in film_frames(folder, outcome.episode)] for outcome in shown]
    longest = max(len(film) for film in films)
    padded = [film + [film[-1]] * (longest - len(film)) for film in films]
    write_film(path, [np.concatenate(frames, axis=1) for frames in zip(*padded, strict=True)], fps=FPS)


def _labelled(outcome: Outcome, frame: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(frame)
    ImageDraw.Draw(picture).text((6, 4), f"{outcome.copy.name}: reaches {outcome.reached}", fill=(20, 20, 20))
    return np.asarray(picture)


def _scale(maps: Mapping[str, Mapping[str, Any]]) -> Normalize:
    """One for all cameras of a reader, with uniform attention in the middle."""
    return around_one([np.array(each["grid"]) for each in maps.values()])


def _heat_map(axes: Axes, patches: Sequence[Mapping[str, Any]], key: str, colours: str, norm: Normalize) -> float:
    """Draws one quantity, segment × layer; returns its largest value."""
    sites, segments = _unique(patches, "site"), _unique(patches, "segment")
    values = np.array([[_find(patches, site, segment)[key] for site in sites] for segment in segments])
    axes.imshow(values, cmap=colours, norm=norm, aspect="auto")
    axes.set_xticks(range(len(sites)), [_site_label(site) for site in sites], fontsize=11)
    counts = [_find(patches, sites[0], segment)["n_tokens"] for segment in segments]
    names = [f"{name}\n{n} token{'s' if n > 1 else ''}" for name, n in zip(segments, counts, strict=True)]
    axes.set_yticks(range(len(segments)), names, fontsize=10)
    for y, segment in enumerate(segments):
        for x, site in enumerate(sites):
            outcome = _find(patches, site, segment)["outcome"]
            plain = key == "random_displacement" or outcome == "partial"
            text = f"{values[y, x]:.2f}" if plain else outcome.replace(" ", "\n")
            red, green, blue, _ = colormaps[colours](norm(values[y, x]))
            ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            axes.text(x, y, text, ha="center", va="center", fontsize=10, color=ink,
                      style="normal" if plain else "italic")  # fmt: skip
    return float(values.max())


def _bars(axes: Axes, patches: Sequence[Mapping[str, Any]]) -> None:
    series = {
        "displacement": ("displacement", "#3b6fb6"),
        "how far to B's actions": ("toward_b", "#d1603d"),
        "control: displacement in random directions": ("random_displacement", "#b0b0b0"),
    }
    for i, (label, (key, colour)) in enumerate(series.items()):
        x = np.arange(len(patches)) + 0.27 * (i - 1)
        drawn = axes.bar(x, [patch[key] for patch in patches], 0.25, label=label, color=colour)
        axes.bar_label(drawn, fmt="%.2f", fontsize=9, padding=2)
    outcomes = ["" if patch["outcome"] == "partial" else f"\n{patch['outcome']}" for patch in patches]
    labels = [_site_label(patch["site"]) + outcome for patch, outcome in zip(patches, outcomes, strict=True)]
    axes.set_xticks(range(len(patches)), labels, fontsize=11)
    axes.set_xlabel("expert residual stream entering block: all action tokens, every denoise step", fontsize=11)
    axes.set_ylabel("in units of |B − A|", fontsize=11)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=10, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=3, frameon=False)


def _key(axes: Axes, results: Mapping[str, Any]) -> None:
    axes.axis("off")
    instructions, swaps, controls = results["instructions"], results["input_swaps"], results["controls"]
    lines = [
        f"A: “{instructions['A']}”",
        f"B: “{instructions['B']}”",
        f"B's instruction given to A as input: {swaps['language']['displacement']:.2f}",
        f"another draw of the starting noise: {controls['other_noise_displacement']:.2f}",
        f"floor, the same run again: {controls['rerun_displacement']:g}",
        "",
        "replay: every action is B's, bit for bit. The patch",
        "is a cut set, so it is no evidence about this place.",
        "no effect: every action is A's, bit for bit.",
        "out: leaving the last block. In the VLM nothing",
        "reads it: the expert takes each block's keys and",
        "values, made from what enters the block.",
    ]
    text = axes.text(-0.12, 1.05, "\n".join(lines), va="top", fontsize=11, linespacing=1.6, transform=axes.transAxes)
    text.set_in_layout(False)


def _patch_table(patches: Sequence[Mapping[str, Any]]) -> Table:
    segments = _unique(patches, "segment")
    table = Table("block", *segments, box=box.SIMPLE)
    for site in _unique(patches, "site"):
        mine = [_find(patches, site, segment) for segment in segments]
        table.add_row(_site_label(site), *(_cell(patch) for patch in mine))
        table.add_row("", *(f"random {patch['random_displacement']:.2f}" for patch in mine), style="dim")
    return table


def _cell(patch: Mapping[str, Any]) -> str:
    return (
        f"{patch['displacement']:.2f} {patch['toward_b']:+.2f}" if patch["outcome"] == "partial" else patch["outcome"]
    )


def _site_label(site: str) -> str:
    return "out" if leaf(site) == "hook_resid_post" else str(layer(site))


def _unique(patches: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(patch[key] for patch in patches))


def _find(patches: Sequence[Mapping[str, Any]], site: str, segment: str) -> Mapping[str, Any]:
    return next(patch for patch in patches if patch["site"] == site and patch["segment"] == segment)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=DPI)
