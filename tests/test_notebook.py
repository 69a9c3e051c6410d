"""Pieces of notebook pages: text stays text, and drawings show their numbers."""

import re

import numpy as np
import pytest

from hooked_vla.notebook import Html, bars, cells, colour, h, table

SCRIPT = "<script>alert('1')</script>\" onload=\"x"


def test_text_and_attributes_are_escaped() -> None:
    made = h("p", SCRIPT, h("b", "kept"), None, 3, title=SCRIPT, class_="a", stroke_width=2)
    assert "<script" not in made.markup and "<b>kept</b>3" in made.markup
    assert 'class="a"' in made.markup and 'stroke-width="2"' in made.markup and ' onload="' not in made.markup
    assert made._repr_html_() == made.markup
    shown = [table((SCRIPT,), [(SCRIPT, 0.12345)], SCRIPT), bars([1], [SCRIPT], SCRIPT),
             cells(np.ones((1, 1), np.float32), 1.0, [[SCRIPT]], SCRIPT)]  # fmt: skip
    assert not [each for each in shown if "<script" in each.markup or ' onload="' in each.markup]
    assert "0.123" in shown[0].markup


def test_a_page_loads_nothing(tmp_path) -> None:
    h("p", "näher").save(tmp_path / "deep" / "p.html", title=SCRIPT)
    page = (tmp_path / "deep" / "p.html").read_text(encoding="utf-8")
    assert "näher" in page and "<script" not in page and not re.search(r"(src|href)=", page)
    assert repr(Html("12345")) == "Html(5 characters; save(path) writes a page)"


def test_colours_go_from_dark_to_bright() -> None:
    assert colour(0) == colour(-1) == "#440154" and colour(1) == colour(2) == "#fde725" and colour(0.5) == "#21918c"
    sums = [sum(int(colour(share)[i : i + 2], 16) for i in (1, 3, 5)) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert sums[0] < sums[2] < sums[4]


def test_drawings_have_a_shape_for_every_number() -> None:
    drawn = bars([0, 9, 99], ["a", "b", "c"], "counts").markup
    heights = [float(each) for each in re.findall(r'<rect [^>]* height="([\d.]+)"', drawn)]
    assert heights == [0.0, pytest.approx(40.0), pytest.approx(80.0)] and "c: 99" in drawn
    squares = cells(np.array([[0.0, 2.0]]), 2.0, [["p", "q"]], "heat").markup
    assert re.findall(r'fill="(#\w+)"', squares) == ["#440154", "#fde725"] and "<title>q</title>" in squares
    assert 'fill="#440154"' in cells(np.zeros((1, 1)), 0.0, [["z"]], "none").markup
