"""Models: what they are built of, what can be hooked in them, and which results name a place in them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooked_vla import registry
from hooked_vla.atlas.routes import NotThere, Route, once
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.skeletons import shipped_spec, skeleton, spec_from_json
from hooked_vla.atlas.views.named_places import results_of
from hooked_vla.describe import pathways
from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.sites import HookSite
from hooked_vla.vla import HookedVLA
from hooked_vla.weights import shipped_policies

RUN, PACKAGE, PUBLISHED = "run", "package", "published"
# a numbered module, and the block within it: what is drawn as one box
_UNIT = re.compile(r"(.*?\.[a-z_]+\.\d+(?:\.blocks\.\d+)?)\.")


@dataclass(frozen=True)
class Known:
    """A model that can be drawn. source: where it comes from; spec: as a manifest has it, None for the library's own;
    seen: keys of the run's experiments and rollouts with it."""

    key: str
    name: str
    source: str
    spec: Mapping[str, Any] | None
    seen: tuple[str, ...] = ()


def all_models(run: Run) -> list[dict[str, Any]]:
    """What can be drawn: the run's models, the package's policies, the published families."""
    return [
        {"key": each.key, "name": each.name, "source": each.source, "seen": len(each.seen),
         "family": each.spec.get("name") if each.spec else _own_spec_name(each)}
        for each in _known(run).values()
    ]  # fmt: skip


def model(run: Run, key: str) -> dict[str, Any]:
    """A model's pathways, boxes and sites. Raises NotThere; ValueError for a manifest's spec that cannot be built."""
    known = _find(run, key)
    built = _built(run, key)
    spec = built.spec
    return {
        "key": key,
        "name": known.name,
        "source": known.source,
        "family": spec.name,
        "description": spec.description,
        "paper": spec.paper,
        "licence": spec.licence,
        "wiring": spec.source,
        "parameters": sum(parameter.numel() for parameter in built.net.parameters()),
        "denoise_steps": built.n_denoise_steps,
        "cameras": list(spec.features.cameras),
        "d_state": spec.features.d_state,
        "d_action": spec.features.d_action,
        "dead_ends": list(built.dead_ends),
        "pathways": [
            {"name": row.name, "meaning": hook_names.PATHWAYS.get(row.name, ""), "parameters": row.parameters,
             "blocks": row.blocks, "d_model": row.d_model, "points": row.points}
            for row in pathways(built)
        ],
        "boxes": _boxes(built.hook_points),
    }  # fmt: skip


def results(run: Run, key: str) -> list[dict[str, Any]]:
    """Which values of the run's tables name a place of the model, and what was measured there: see `results_of`.

    Raises NotThere.
    """
    known = _find(run, key)
    if not known.seen:
        return []
    return run.keep(f"results {key}", lambda: results_of(run, known.name, _built(run, key)))


def _boxes(sites: Mapping[str, HookSite]) -> list[dict[str, Any]]:
    """The sites by the box that they are in, in the order of the network.

    name: of the box's module; "in" and "out": what a pathway has before and after its numbered modules. reads: the
    block has its own view of the prefix's keys and values.
    """
    boxes: dict[str, dict[str, Any]] = {}
    numbered: set[str] = set()
    for name, site in sites.items():
        found = _UNIT.match(name)
        if found is not None:
            box, part = found[1], ""
            numbered.add(site.pathway)
        else:
            part = "out" if site.pathway in numbered else "in"
            box = f"{site.pathway}.{part}"
        entry = boxes.setdefault(box, {"name": box, "pathway": site.pathway, "part": part, "sites": [], "reads": False})
        entry["sites"].append({
            "name": name, "shape": list(site.shape), "axes": list(site.axes),
            "dtype": str(site.dtype).removeprefix("torch."), "meaning": site.meaning, "repeated": site.denoised,
            "reaches": site.reaches_action,
        })  # fmt: skip
        entry["reads"] |= hook_names.leaf(name) == "hook_prefix_k"
    for entry in boxes.values():
        dead = sum(not site["reaches"] for site in entry["sites"])
        entry["dead"] = "all" if dead == len(entry["sites"]) else "some" if dead else "none"
    return list(boxes.values())


def _built(run: Run, key: str) -> HookedVLA:
    known = _find(run, key)
    return run.keep(f"skeleton {key}", lambda: skeleton(_spec(known)))


def _spec(known: Known) -> Any:
    if known.spec is not None:
        return spec_from_json(known.spec)
    return shipped_spec(known.name) if known.source == PACKAGE else registry.get_spec(known.name)


def _own_spec_name(known: Known) -> str:
    return known.name if known.source == PUBLISHED else shipped_spec(known.name).name


def _find(run: Run, key: str) -> Known:
    known = _known(run)
    if key not in known:
        raise NotThere(f"there is no model {key!r}")
    return known[key]


def _known(run: Run) -> dict[str, Known]:
    return run.keep("models", lambda: _collect(run))


def _collect(run: Run) -> dict[str, Known]:
    found: dict[str, Known] = {}
    for folder in [*run.experiments.values(), *run.rollouts.values()]:
        about = folder.about.get("model")
        if not isinstance(about, Mapping) or not isinstance(about.get("spec"), Mapping):
            continue
        name = str(about.get("name", "model"))
        key = re.sub(r"[^A-Za-z0-9._-]", "_", Path(name).name)[:100] or "model"
        if key in found and found[key].spec != about["spec"]:
            key = f"{key}-{re.sub('[^0-9a-f]', '', str(about.get('weights')))[:8]}"
        before = found[key].seen if key in found else ()
        found[key] = Known(key, Path(name).name, RUN, about["spec"], (*before, folder.key))
    for source, names in ((PACKAGE, shipped_policies()), (PUBLISHED, registry.list_models())):
        for name in names:
            found.setdefault(name, Known(name, name, source, None))
    return found


def _of_run(run: Run) -> Iterator[Mapping[str, str]]:
    yield from ({"key": each.key} for each in _known(run).values() if each.source == RUN)


def _drawn(run: Run) -> Iterator[Mapping[str, str]]:
    """A copy holds the run's own models and the package's; the published sizes are the same in every copy."""
    yield from ({"key": each.key} for each in _known(run).values() if each.source != PUBLISHED)


ROUTES = [
    Route("models", all_models, listing=once),
    Route("models/{key}", model, listing=_drawn),
    Route("models/{key}/results", results, listing=_of_run),
]
