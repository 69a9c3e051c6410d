"""Pieces of what notebooks show: HTML in which text stays text, colours of heat maps, and small drawings.

>>> div(h("b", feature.description), bars([3, 2, 1], ["0", "1", "2"]))     # an Html, which a notebook shows

Everything is in the HTML itself: no script, nothing loaded from elsewhere.
"""

import html
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from jaxtyping import Float

from hooked_vla.extras import needs_packages
from hooked_vla.folders import write_file

# matplotlib's viridis at equal distances (BSD, van der Walt & Smith 2015)
_VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
_PAGE = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>'
    '<body style="color-scheme:light dark">{body}</body></html>'
)


class Html:
    """A piece of HTML. A notebook shows it, `save` writes it as a page."""

    def __init__(self, markup: str) -> None:
        """markup: goes into pages as it is; `h` makes it of text that does not."""
        self.markup = markup

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return f"Html({len(self.markup):,} characters; save(path) writes a page)"

    def save(self, path: str | Path, title: str = "") -> None:
        """Write a page that opens in a browser by itself; it appears when complete. Raises OSError."""
        write_file(Path(path), _PAGE.format(title=html.escape(title), body=self.markup).encode())


def h(tag: str, *children: "Html | str | float | int | None", **attributes: str | float | int | None) -> Html:
    """An element. children: text is escaped, None left out. attributes: class_ is class, stroke_width stroke-width."""
    named = [(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items() if value is not None]
    given = "".join(f' {name}="{html.escape(str(value), quote=True)}"' for name, value in named)
    inside = "".join(each.markup if isinstance(each, Html) else html.escape(str(each)) for each in children
                     if each is not None)  # fmt: skip
    return Html(f"<{tag}{given}>{inside}</{tag}>")


def table(header: Sequence[str], rows: Sequence[Sequence["Html | str | float | int"]], caption: str) -> Html:
    """A table; numbers are shown with three digits and stand to the right."""
    style = "padding:2px 8px;text-align:"
    lines = []
    for row in rows:
        cells = [h("td", f"{each:.3g}" if isinstance(each, float) else each,
                   style=style + ("right" if isinstance(each, int | float) else "left")) for each in row]  # fmt: skip
        lines.append(h("tr", *cells))
    head = h("tr", *(h("th", name, scope="col", style=style + "left") for name in header))
    body = [h("thead", head), h("tbody", *lines)]
    top = h("caption", caption, style="text-align:left;font-weight:600;padding:2px 8px")
    return h("table", top, *body, style="border-collapse:collapse;font-size:13px;margin:0 24px 12px 0")


def colour(share: float | int) -> str:
    """Viridis at a share of the largest value, "#rrggbb"; shares outside 0..1 are those of the ends."""
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    i = min(int(place), len(_VIRIDIS) - 2)
    low, high = (np.array([int(each[k : k + 2], 16) for k in (1, 3, 5)]) for each in _VIRIDIS[i : i + 2])
    return "#" + "".join(f"{round(each):02x}" for each in low + (high - low) * (place - i))


def bars(counts: Sequence[float | int], labels: Sequence[str], name: str, width: int = 360, height: int = 80) -> Html:
    """Bars whose heights are logarithms of 1 + count. labels: shown when pointed at; name: what it is a drawing of."""
    top = max(float(np.log1p(max(counts, default=0.0))), 1e-9)
    step = width / max(len(counts), 1)
    drawn = []
    for i, (count, label) in enumerate(zip(counts, labels, strict=True)):
        tall = float(np.log1p(count)) / top * height
        drawn.append(h("rect", h("title", f"{label}: {count:g}"), x=f"{i * step:.1f}", y=f"{height - tall:.1f}",
                       width=f"{max(step - 1, 0.5):.1f}", height=f"{tall:.1f}", fill="#0072b2"))  # fmt: skip
    line = h("line", x1=0, x2=width, y1=height, y2=height, stroke="currentColor", stroke_opacity="0.5")
    return _svg(width, height, name, *drawn, line)


def cells(values: Float[np.ndarray, "row column"], top: float | int, labels: Sequence[Sequence[str]], name: str,
          size: int = 12) -> Html:  # fmt: skip
    """Numbers as coloured squares. top: what is shown brightest; labels: of every cell, shown when pointed at."""
    rows, columns = values.shape
    drawn = [
        h("rect", h("title", labels[i][j]), x=j * size, y=i * size, width=size, height=size,
          fill=colour(float(values[i, j]) / top if top > 0 else 0.0))
        for i in range(rows) for j in range(columns)
    ]  # fmt: skip
    return _svg(columns * size, rows * size, name, *drawn)


def _svg(width: float | int, height: float | int, name: str, *children: Html) -> Html:
    style = "max-width:100%;height:auto;vertical-align:top"
    return h("svg", *children, viewBox=f"0 0 {width:g} {height:g}", width=width, height=height, role="img",
             aria_label=name, style=style)  # fmt: skip


def needs_plotly() -> AbstractContextManager[None]:
    """`needs_packages` for interactive figures."""
    return needs_packages(("plotly",), "interactive figures need: pip install 'hooked-vla[atlas]'")
