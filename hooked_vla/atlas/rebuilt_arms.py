"""Arms made again from what a manifest says of them, where that is the whole of it."""

from collections.abc import Callable, Mapping
from typing import Any

from hooked_vla.interventions import EditArm
from hooked_vla.interventions.files import read_edits
from hooked_vla.rollouts.arms import Arm, Baseline
from hooked_vla.rollouts.batteries.arms import ImageArm, PromptArm
from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.injection import Told, ToldArm
from hooked_vla.rollouts.suites import Suite


def rebuild(name: str, about: Mapping[str, Any], suite: Suite) -> tuple[Arm | None, str | None]:
    """The arm and None; or None and why its description does not say enough to act under it."""
    makers: dict[Any, Callable[[str, Mapping[str, Any]], Arm]] = {
        "baseline": lambda name, _: Baseline(name),
        "prompt": _prompt,
        "image": _image,
        "edits": lambda name, about: EditArm(name, read_edits({k: v for k, v in about.items() if k != "kind"})),
    }
    kind = about.get("kind")
    if kind not in makers:
        return None, f"what an arm of the kind {kind!r} puts in is not in the manifest"
    try:
        return makers[kind](name, about), None
    except (KeyError, TypeError, ValueError, OSError) as error:
        return None, f"its description does not hold all of it: {error}"


def _prompt(name: str, about: Mapping[str, Any]) -> Arm:
    if "change" in about:
        return PromptArm(name, about["change"], tuple(about["instructions"]), "run")
    told = []
    for entry in about["told"]:
        text = entry["text"]
        if isinstance(text, list):
            text = {Scene(task, seed): said for task, seed, said in text}
        told.append(Told(text, entry["start"]))
    return ToldArm(name, told)


def _image(name: str, about: Mapping[str, Any]) -> Arm:
    cameras = None if about["cameras"] is None else tuple(about["cameras"])
    return ImageArm(name, about["change"], about["strength"], cameras, "run")
