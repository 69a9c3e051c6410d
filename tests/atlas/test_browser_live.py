"""The live view in a browser: what is asked for runs, is shown as it happens, and can be stopped."""

from collections.abc import Callable

from playwright.sync_api import Page, Route, expect

PLACE = "#/live?task=red-orange&seed=3&max_steps=6"
# the worker begins, and loads a policy
SLOW = 120_000


def test_twins_are_shown_step_by_step_until_they_are_over(served: str, open_page: Callable[..., Page]) -> None:
    page = open_page(served, PLACE)
    page.get_by_role("button", name="Add an edit").click()
    page.get_by_label("Site").select_option("vlm.blocks.1.hook_resid_post", timeout=SLOW)
    page.get_by_label("From the task").select_option("green-cyan")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("status").filter(has_text="Done")).to_have_count(1, timeout=SLOW)
    for name in ("Unedited", "Edited", "Patched from"):
        section = page.get_by_role("region", name=name, exact=True)
        expect(section).to_contain_text("after 6 steps")
        picture = section.get_by_role("img").first
        assert picture.evaluate("node => node.naturalWidth") == 96
    assert "hook_resid_post" in page.url
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # the address asks for the same again
    again = open_page(served, page.url.split("/", 3)[3])
    expect(again.get_by_label("From the task")).to_have_value("green-cyan", timeout=SLOW)


def test_a_rollout_is_stopped_and_another_page_watches_the_same(served: str, open_page: Callable[..., Page]) -> None:
    # one that sees nothing does not come to an end by itself
    page = open_page(served, "#/live?task=red-orange&seed=4&max_steps=400&image=blank")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("region", name="Edited", exact=True)).to_contain_text("step", timeout=SLOW)
    other = open_page(served, "#/live")
    # from its beginning, and no other beside it
    expect(other.get_by_role("region", name="Edited", exact=True)).to_contain_text("step", timeout=SLOW)
    expect(other.get_by_role("button", name="Run")).to_be_disabled()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status").filter(has_text="Stopped")).to_have_count(1, timeout=30_000)
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    expect(other.get_by_role("status").filter(has_text="Stopped")).to_have_count(1)


def test_what_cannot_run_is_said_at_the_form(served: str, open_page: Callable[..., Page]) -> None:
    page = open_page(served, PLACE, width=400, scheme="dark", expected=("400",))
    page.get_by_label("Seed").fill("many")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("seed: a whole number")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    unlabelled = page.evaluate(
        "[...document.querySelectorAll('main input, main select')].filter(each => !each.labels.length).length"
    )
    assert unlabelled == 0


def test_nothing_is_run_while_sites_are_listed(served: str, open_page: Callable[..., Page]) -> None:
    """One process does both, and would be busy."""
    page = open_page(served, PLACE, expected=("409",))
    held: list[Route] = []
    page.route("**/api/live/sites*", lambda route: held.append(route))
    run, add = page.get_by_role("button", name="Run"), page.get_by_role("button", name="Add an edit")
    for status, answer in ((409, {"error": "in vain"}), (200, {"sites": [], "cameras": []})):
        expect(run).to_be_enabled()
        with page.expect_request("**/api/live/sites*"):
            add.click()
        expect(run).to_be_disabled()
        # whatever is chosen meanwhile
        page.get_by_label("Task", exact=True).select_option("green-cyan")
        expect(run).to_be_disabled()
        held.pop().fulfill(status=status, json=answer)
        expect(run).to_be_enabled()
        expect(page.get_by_role("alert").filter(has_text="in vain")).to_have_count(int("error" in answer))
