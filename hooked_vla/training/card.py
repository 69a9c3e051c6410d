"""The model card: what a shipped policy was trained on, how, and what it does, with intervals."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any

from hooked_vla.folders import write_file, write_json
from hooked_vla.rollouts.summary import Rate
from hooked_vla.training.batches import Prompting
from hooked_vla.training.demonstrations import NOISES
from hooked_vla.training.recipes import Recipe
from hooked_vla.vla import HookedVLA

_PACKAGES = ("torch", "mujoco", "gymnasium", "numpy", "transformers")


def facts(
    name: str, recipe: Recipe, model: HookedVLA, seed: int, rates: Mapping[str, Rate], evaluation_seed: int,
    curve: Sequence[Mapping[str, float]],
) -> dict[str, Any]:  # fmt: skip
    """Everything that the card says, as data. curve: success while training, a row a check; "step" and suites."""
    schedule, corrections = recipe.schedule, recipe.corrections
    return {
        "name": name,
        "family": recipe.spec,
        "parameters": sum(each.numel() for each in model.net.parameters()),
        "seed": seed,
        "cameras": list(model.spec.features.cameras),
        "n_action_steps": model.spec.features.n_action_steps,
        "demonstrations": {
            "moments": recipe.moments, "retold": recipe.retold, "suites": dict(recipe.suites),
            "action_noise": list(NOISES),
        },
        "prompts": asdict(Prompting()) if model.spec.features.max_text else None,
        "vision_tower": {"steps": recipe.tower_steps, "frozen": True},
        "imitation": asdict(schedule),
        "corrections": asdict(corrections),
        "learning_curve": [dict(row) for row in curve],
        "success": {suite: rate.to_json() for suite, rate in rates.items()},
        "evaluation_seed": evaluation_seed,
        "versions": {"python": platform.python_version()} | {each: version(each) for each in _PACKAGES},
    }  # fmt: skip


def write_card(folder: Path, data: Mapping[str, Any]) -> None:
    """README.md for people and card.json for programs."""
    write_json(folder / "card.json", data)
    write_file(folder / "README.md", _markdown(data).encode())


def _markdown(data: Mapping[str, Any]) -> str:
    rows = [
        f"| {suite} | {rate['successes']} of {rate['episodes']} | {rate['success_rate']:.1%} "
        f"| {rate['interval'][0]:.1%} to {rate['interval'][1]:.1%} |"
        for suite, rate in data["success"].items()
    ]
    about = [text for suite, text in _ABOUT.items() if suite in data["success"]]
    intro = (
        f"A small {data['family']} ({data['parameters']:,} parameters: the family's own code at a reduced size), "
        f"trained by imitation to act on the tabletop. Cameras {', '.join(data['cameras'])} at 96 pixels; "
        f"{data['n_action_steps']} actions of each chunk are executed."
    )
    starts = (
        f"On starts that were never trained on (seeds from {data['evaluation_seed']}), with Wilson's 95 % intervals:"
    )
    parts = [f"# {data['name']}", _wrapped(intro), "## Success", _wrapped(starts)]
    parts.append("\n".join(["| suite | episodes | success | interval |", "|---|---|---|---|", *rows]))
    if about:
        parts.append(_wrapped(" ".join(about)))
    parts += ["## Training", "\n".join(_wrapped(f"- {line}", "  ") for line in _training(data))]
    return "\n\n".join(parts) + "\n"


_ABOUT = {
    "shift": "`shift` puts blocks where no demonstration had them.",
    "style": "In `style`, success is that the block arrives, however it went.",
}


def _training(data: Mapping[str, Any]) -> list[str]:
    demos, imitation, corrections = data["demonstrations"], data["imitation"], data["corrections"]
    shares = ", ".join(f"{share:.0%} {suite}" for suite, share in demos["suites"].items())
    noises = ", ".join(map(str, demos["action_noise"]))
    checks = [
        f"{rate:.0%} of {suite} after {row['step'] * imitation['batch']:,.0f}"
        for row in data["learning_curve"]
        for suite, rate in row.items()
        if suite != "step"
    ]
    lines = [
        f"{demos['moments']:,} recorded moments of the scripted expert ({shares}), its movements disturbed by noise of "
        f"{noises} times the largest step; labels are what the expert would do undisturbed.",
        f"The vision tower was pretrained for {data['vision_tower']['steps']:,} steps on places of objects, then "
        "frozen.",
        f"Imitation: {imitation['steps']:,} steps of {imitation['batch']} moments, noise drawn {_times(imitation)} for "
        f"each, AdamW at {imitation['rate']}.",
    ]
    if corrections["rounds"]:
        lines.append(
            f"{corrections['rounds']} rounds of corrections (DAgger) with {corrections['moments']:,} moments and "
            f"{corrections['steps']:,} steps each."
        )
    if checks:
        lines.append(f"Learning curve, on 24 episodes, by moments seen: {', '.join(checks)}.")
    if data["prompts"]:
        prompts = data["prompts"]
        lines.append(f"Prompts: {prompts['paraphrased']:.0%} paraphrased, {prompts['dropped']:.0%} left empty.")
    # what was done otherwise than the recipe says
    if "note" in data:
        lines.append(data["note"])
    return [*lines, f"Seed {data['seed']}. Again: `hooked-vla train {data['name']} --out DIR`."]


def _times(imitation: Mapping[str, Any]) -> str:
    return "once" if imitation["n_draws"] == 1 else f"{imitation['n_draws']} times"


def _wrapped(text: str, indent: str = "") -> str:
    return fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
