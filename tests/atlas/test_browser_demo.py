"""Who opens the demonstration's folder finds the patched robot in two clicks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from unchecked import unchecked_shapes

from hooked_vla import HookedVLA, demo
from hooked_vla.atlas.run import Run
from hooked_vla.demo_goals import run_goals

SLOW = 120_000


@pytest.mark.parametrize("width", [1280, 400])
def test_the_patched_robot_is_two_clicks_away(
    demonstration: Path, tmp_path: Path, serve_run: Callable[..., AbstractContextManager[str]],
    open_page: Callable[..., Page], width: int,
) -> None:  # fmt: skip
    run = Run.open(demonstration, cache=tmp_path / "cache")
    with serve_run(run, live=False) as address:
        page = open_page(address, width=width)
        page.get_by_role("link", name="Edited and baseline side by side").click()
        expect(page.get_by_label("This arm")).to_contain_text("A, patched at block 0")
        expect(page.get_by_label("Beside it")).to_have_value("A")
        patched = page.get_by_role("region", name="A, patched at block 0", exact=True)
        # its task is goal A: the block of B was moved, onto the pad of B
        expect(patched).to_contain_text("blue was moved")
        expect(patched).to_contain_text("from the centre of cyan")
        expect(page.get_by_role("region", name="A", exact=True)).to_contain_text("from the centre of orange")
        for i in (0, 1):
            expect(page.locator("video").nth(i)).to_be_visible(timeout=SLOW)
        page.keyboard.press("End")
        expect(page.locator(".ep-where")).to_contain_text("the end")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    run.close()


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of episodes that a demonstration leaves, without its pictures."""
    out = tmp_path_factory.mktemp("demonstration")
    with unchecked_shapes():
        run_goals(HookedVLA.from_pretrained(demo.MODEL), demo.MODEL, demo.GOALS, demo.SEED, out / demo.RECORD)
    return out
