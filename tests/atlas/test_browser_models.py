"""Models in a browser: a box or a site leads to its shape, its meaning and its results."""

from collections.abc import Callable

import pytest
from accessible import hidden_focus, problems
from playwright.sync_api import Page, expect

Visit = Callable[[Page, str], Page]


@pytest.fixture(params=["served", "exported"])
def address(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


def test_from_a_box_to_a_site_to_its_results(open_page: Callable[..., Page], address: str) -> None:
    page = open_page(address, "#/models")
    expect(page.get_by_label("Model", exact=True)).to_have_value("smolvla-tabletop")
    page.get_by_role("link", name="vlm.blocks.2, ").click()
    expect(page.get_by_role("heading", level=2)).to_have_text("vlm.blocks.2")
    page.get_by_role("link", name="vlm.blocks.2.hook_resid_post").click()
    expect(page.get_by_role("heading", level=2)).to_have_text("vlm.blocks.2.hook_resid_post")
    expect(page.get_by_text("[batch, seq, 128]")).to_be_visible()
    expect(page.get_by_text("residual stream leaving the block")).to_be_visible()
    result = page.get_by_role("table", name="Results that name vlm.blocks.2.hook_resid_post").get_by_role("row")
    expect(result.filter(has_text="vlm:middle").first).to_contain_text("success")
    result.get_by_role("link", name="vlm:middle", exact=True).first.click()
    expect(page.locator("caption").filter(has_text="results: 1 row")).to_be_visible()


def test_what_no_action_depends_on_is_marked(open_page: Callable[..., Page], visit: Visit, address: str) -> None:
    page = open_page(address, "#/models/smolvla-tabletop/vlm.out")
    expect(page.get_by_role("link", name="vlm.out, ")).to_have_class("box dead-all chosen")
    expect(page.get_by_text("no action depends on it", exact=False).first).to_be_visible()
    visit(page, "#/models/smolvla-tabletop/vlm.blocks.3.attn.hook_pattern")
    expect(page.get_by_role("heading", level=2)).to_have_text("vlm.blocks.3.attn.hook_pattern")
    expect(page.locator("dd .badge")).to_have_text("dead end")


def test_other_models_can_be_drawn(open_page: Callable[..., Page], served: str) -> None:
    page = open_page(served, "#/models")
    page.get_by_label("Model", exact=True).select_option("act-tabletop")
    expect(page.get_by_role("group", name="Architecture of act-tabletop")).to_be_visible()
    expect(page.get_by_role("link", name="pathway encoder")).to_be_visible()


def test_a_place_that_there_is_not_is_told(open_page: Callable[..., Page], served: str) -> None:
    page = open_page(served, "#/models/smolvla-tabletop/vlm.blocks.99")
    expect(page.get_by_text("has no hook point or block vlm.blocks.99")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_everyone_can_read_it(
    open_page: Callable[..., Page], visit: Visit, served: str, width: int, scheme: str
) -> None:
    page = open_page(served, "#/models", width=width, scheme=scheme)
    assert problems(page) == []
    for place in ("smolvla-tabletop/expert.blocks.1", "smolvla-tabletop/vlm.blocks.2.hook_resid_post"):
        assert problems(visit(page, f"#/models/{place}")) == []
    assert hidden_focus(page) == []
