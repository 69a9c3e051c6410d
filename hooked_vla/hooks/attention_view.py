"""Attention patterns of a cache, to look at: a figure for notebooks, and what CircuitsVis draws."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor

from hooked_vla.hooks import names as hook_names
from hooked_vla.inputs import Segments
from hooked_vla.notebook import needs_plotly

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from hooked_vla.hooks.cache import ActivationCache


class CircuitsVisAttention(NamedTuple):
    """Attention as `circuitsvis.attention` takes it: for layer i, `attention_heads(attention[i], tokens)`.

    tokens: names of the positions along both last axes. Where queries are other tokens than keys (cross-attention, or
    a suffix that reads a prefix), tokens are the keys' and then those queries that are no keys, and rows and columns of
    what does not ask or is not read are 0. sites: of the layers.
    """

    tokens: list[str]
    attention: Float32[Tensor, "layer head query key"]
    sites: list[str]


class Pattern(NamedTuple):
    """One row of one site at one denoise step. queries, keys: names of the tokens; same: whether the queries are the
    last of the keys, or all."""

    weights: Float32[Tensor, "head query key"]
    queries: list[str]
    keys: list[str]
    same: bool


def pattern_of(cache: "ActivationCache", site: str, row: int, step: int | None) -> Pattern:
    """See `ActivationCache.attention`."""
    if hook_names.leaf(site) != "hook_pattern":
        raise ValueError(f"{site} is no attention pattern; nearest: {hook_names.nearest(site, [*cache], 1)}")
    value = cache[site]
    entry = cache.entries[value.site]
    axes = entry.axes
    if entry.steps is not None:
        chosen = entry.steps[-1] if step is None else step
        if chosen not in entry.steps:
            raise KeyError(f"denoise step {step} of {site} is not cached; cached: {list(entry.steps)}")
        value, axes = value[entry.steps.index(chosen)], axes[1:]
    elif step is not None:
        raise ValueError(f"{site} runs once, not at denoise steps: leave step out")
    if axes[1:] != ("n_heads", "query", "key") or "window" in axes:
        raise ValueError(f"{site} ({' '.join(axes)}) is not attention of heads between tokens")
    if not 0 <= row < value.shape[0]:
        raise IndexError(f"row {row}: {site} has rows 0..{value.shape[0] - 1}")
    tables = [cache.segments[entry.streams[axis]] for axis in ("query", "key")]
    queries, keys = (token_names(table, row) for table in tables)
    return Pattern(value[row].detach().float().cpu(), queries, keys, keys[len(keys) - len(queries) :] == queries)


def token_names(segments: Segments, row: int) -> list[str]:
    """Positions of a row as "language 0", "language 1", ..., counted within each segment."""
    counts: dict[int, int] = {}
    found = []
    for label in segments.labels[row].tolist():
        counts[label] = counts.get(label, -1) + 1
        found.append(f"{segments.names[label]} {counts[label]}")
    return found


def attention_figure(pattern: Pattern, title: str) -> "Figure":
    """Queries × keys of the mean over heads, and of each head by a menu."""
    with needs_plotly():
        from plotly import graph_objects
    weights, queries, keys = pattern.weights, pattern.queries, pattern.keys
    shown = [("mean of heads", weights.mean(0)), *((f"head {i}", each) for i, each in enumerate(weights))]
    # names along the axes may come twice: places are numbers, and names are told
    text = [[html.escape(f"{query} reads {key}") for key in keys] for query in queries]
    heat = graph_objects.Heatmap(
        z=shown[0][1].numpy(), text=text, hovertemplate="%{text}: %{z:.3g}<extra></extra>", colorscale="Viridis",
        zmin=0, colorbar={"title": "share"},
    )  # fmt: skip
    buttons = [{"label": name, "method": "restyle", "args": [{"z": [each.tolist()]}]} for name, each in shown]
    axes = [{"title": title, "tickvals": [at for at, _ in spans], "ticktext": [name for _, name in spans]}
            for title, spans in (("key", _spans(keys)), ("query", _spans(queries)))]  # fmt: skip
    figure = graph_objects.Figure(heat)
    figure.update_layout(
        title={"text": html.escape(title)}, xaxis=axes[0], yaxis={**axes[1], "autorange": "reversed"}, height=520,
        updatemenus=[{"buttons": buttons, "x": 1.0, "xanchor": "right", "y": 1.15}],
    )  # fmt: skip
    return figure


def _spans(tokens: Sequence[str]) -> list[tuple[float, str]]:
    """Middle and name of each run of tokens of one segment."""
    names = [token.rpartition(" ")[0] for token in tokens]
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    ends = [*starts[1:], len(names)]
    return [((start + end - 1) / 2, html.escape(names[start])) for start, end in zip(starts, ends, strict=True)]


def circuitsvis(
    cache: "ActivationCache", sites: Sequence[str], row: int, step: int | None, tokens: Sequence[str] | None
) -> CircuitsVisAttention:
    """See `ActivationCache.circuitsvis`."""
    found = [pattern_of(cache, site, row, step) for site in sites]
    if not found:
        raise ValueError("no attention patterns among the sites that were asked for")
    squares = [_square(each) for each in found]
    named = {tuple(names): site for (names, _), site in zip(squares, sites, strict=True)}
    if len(named) > 1 or len({each.shape for _, each in squares}) > 1:
        raise ValueError(f"layers differ in tokens or heads, ask for them apart: {list(named.values())}")
    names = list(squares[0][0])
    if tokens is not None and len(tokens) != len(names):
        raise ValueError(f"{len(tokens)} names for {len(names)} tokens: {names[0]!r} to {names[-1]!r}")
    return CircuitsVisAttention(
        names if tokens is None else list(tokens), torch.stack([each for _, each in squares]), list(sites)
    )


def _square(pattern: Pattern) -> tuple[list[str], Tensor]:
    """Names of all tokens, and the weights between them."""
    n_keys, n_queries = len(pattern.keys), len(pattern.queries)
    names = pattern.keys if pattern.same else [*pattern.keys, *pattern.queries]
    square = torch.zeros(len(pattern.weights), len(names), len(names))
    square[:, len(names) - n_queries :, :n_keys] = pattern.weights
    return list(names), square
