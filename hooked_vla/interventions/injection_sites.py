"""Which hook points an injection replaces, by what they hold, in which pathway and how deep."""

import re

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookedModel

# what is replaced -> leaf
KINDS = {"resid": "hook_resid_post", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"}
PREFIX_KV = "prefix_kv"
THIRDS = ("early", "mid", "late")
LAYERS = ("all", "first", "middle", "last", *THIRDS)


def stream_sites(model: HookedModel, pathway: str) -> list[str]:
    """The places of a pathway's residual stream from the first block's input to the last one's output.

    Raises ValueError for a pathway without numbered blocks.
    """
    return [f"{pathway}.blocks.0.hook_resid_pre", *layer_sites(model, pathway)]


def layer_sites(model: HookedModel, pathway: str, layers: str | int = "all", kind: str = "resid") -> list[str]:
    """One hook point a layer: kind "resid" (what the block leaves), "attn_out" or "mlp_out".

    layers: "all", "first", "middle", "last", a third ("early", "mid", "late"; the published groups), or a number.
    Raises ValueError for a pathway without such points, and another kind or choice of layers.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of site {kind!r}; kinds: {', '.join([*KINDS, PREFIX_KV])}")
    form = re.compile(rf"{re.escape(pathway)}\.blocks\.(\d+)\.{KINDS[kind]}")
    found = {int(match[1]): name for name in model.points if (match := form.fullmatch(name))}
    if not found:
        ways = sorted(
            {hook_names.pathway(name) for name in model.points if re.search(r"^\w+\.blocks\.\d+\.hook", name)}
        )
        raise ValueError(f"the model has no blocks with {KINDS[kind]} in a pathway {pathway!r}; pathways: {ways}")
    return [found[i] for i in choose_layers(sorted(found), layers)]


def choose_layers(numbers: list[int], layers: str | int) -> list[int]:
    """Some of the layers. Thirds are as equal as they can be, the middle one takes what is left over.

    Raises ValueError for another choice, or a number that is not there.
    """
    n = len(numbers)
    if isinstance(layers, int):
        if layers not in numbers:
            raise ValueError(f"there is no layer {layers}; layers: {numbers}")
        return [layers]
    bounds = {"all": (0, n), "first": (0, 1), "middle": (n // 2, n // 2 + 1), "last": (n - 1, n)}
    third = max(1, n // 3)
    bounds |= {"early": (0, third), "mid": (third, max(third + 1, n - third)), "late": (n - third, n)}
    if layers not in bounds:
        raise ValueError(f"layers must be one of {', '.join(LAYERS)}, or a number, got {layers!r}")
    return numbers[slice(*bounds[layers])]


def prefix_sites(model: HookedModel) -> list[str]:
    """The keys and values by which the expert reads the prefix, at every layer that reads it.

    Where the expert has its own view of the cached keys and values, that; else what it projects from the prefix.
    Raises ValueError for a model whose expert has the prefix among its own tokens, or has none.
    """
    readers = [name for name, p in model.points.items() if "prefix" in p.axes and name.startswith("expert.")]
    views = [name for name in readers if hook_names.leaf(name) in ("hook_prefix_k", "hook_prefix_v")]
    found = views or [name for name in readers if hook_names.leaf(name) in ("hook_k", "hook_v")]
    if not found:
        raise ValueError("the model's expert reads no prefix by keys and values: it has no prefix_kv")
    return found


def choose_sites(model: HookedModel, text: str) -> list[str]:
    """Hook points by a short text: "PATHWAY", its whole residual stream; "PATHWAY:LAYERS" or "PATHWAY.KIND:LAYERS", as
    `layer_sites` takes them, of one kind at those layers; "prefix_kv", as `prefix_sites`; several joined by "+".

    >>> choose_sites(model, "vlm"), choose_sites(model, "expert:late"), choose_sites(model, "vlm.mlp_out:all")

    Raises ValueError as those do.
    """
    found: list[str] = []
    for part in text.split("+"):
        if part == PREFIX_KV:
            found += prefix_sites(model)
            continue
        way, _, layers = part.partition(":")
        pathway, _, kind = way.partition(".")
        if not layers and not kind:
            found += stream_sites(model, pathway)
        else:
            chosen = int(layers) if layers.isdigit() else layers or "all"
            found += layer_sites(model, pathway, chosen, kind or "resid")
    return list(dict.fromkeys(found))


def residual_sites(model: HookedModel) -> list[str]:
    """Every place of the residual streams of all pathways between the images' encoder and the actions, in order."""
    ways = [way for way in hook_names.PATHWAYS if way not in ("vision", "connector", "decode")]
    return [site for way in ways if f"{way}.blocks.0.hook_resid_post" in model.points
            for site in stream_sites(model, way)]  # fmt: skip
