"""The episodes view in a browser: from a list to two films with one scrubber, by keyboard, on a phone, in a copy."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from waiting import until

from hooked_vla.atlas.run import Run

KEY = "E4--rollouts--main"
# a film is made by replay, in a process that has to begin first
SLOW = 120_000
FITS = "document.documentElement.scrollWidth <= innerWidth"


def test_from_the_list_to_an_edited_episode_beside_its_baseline(served: str, open_page: Callable[..., Page]) -> None:
    page = open_page(served, "#/episodes")
    page.get_by_role("row", name="E4/rollouts/main").get_by_role("link", name="edited and baseline").click()
    expect(page.get_by_label("Beside it")).to_have_value("baseline")
    videos = page.locator("video")
    expect(videos).to_have_count(2)
    for i in (0, 1):
        expect(videos.nth(i)).to_be_visible(timeout=SLOW)
    # every video shows the middle of the step's frame
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".ep-where")).to_contain_text("step 2 of")
    until(page, "[...document.querySelectorAll('video')].every(v => Math.floor(v.currentTime * 20) === 2)")
    until(page, "location.hash.includes('step=2')")
    page.get_by_label("Step", exact=True).fill("5")
    expect(page.locator(".ep-where")).to_contain_text("step 5 of")
    until(page, "[...document.querySelectorAll('video')].every(v => Math.floor(v.currentTime * 20) === 5)")
    page.keyboard.press("End")
    expect(page.locator(".ep-where")).to_contain_text("the end")
    page.get_by_label("Camera").select_option("wrist")
    page.get_by_text("Numbers at this step").click()
    expect(page.get_by_role("row", name="holds")).to_be_visible()
    assert page.evaluate(FITS)


def test_a_film_plays_to_its_end(served: str, open_page: Callable[..., Page]) -> None:
    page = open_page(served, f"#/episodes/{KEY}/2?step=8&speed=4")
    expect(page.locator("video").first).to_be_visible(timeout=SLOW)
    page.get_by_role("button", name="Play").click()
    expect(page.locator(".ep-where")).to_contain_text("the end", timeout=20_000)
    expect(page.get_by_role("button", name="Play")).to_have_text("Play")


def test_attention_is_drawn_over_what_the_policy_saw(served: str, open_page: Callable[..., Page]) -> None:
    page = open_page(served, f"#/episodes/{KEY}/2?step=5&attention=1&site=vlm.blocks.1.attn.hook_pattern&asks=language")
    expect(page.get_by_text("Made again, the plan is the recorded one").first).to_be_visible(timeout=SLOW)
    expect(page.locator("canvas.ep-overlay").first).to_be_visible()
    expect(page.get_by_label("Who asks")).to_have_value("language")
    assert page.locator("canvas.ep-overlay").first.evaluate("node => node.width") == 512
    said = page.locator(".ep-attention-says")
    before = said.inner_text()
    page.get_by_label("Layer").select_option("vlm.blocks.0.attn.hook_pattern")
    expect(said).not_to_have_text(before)
    expect(said).to_contain_text("even attention")
    assert "vlm.blocks.0" in page.url or page.wait_for_url("**vlm.blocks.0**") is None


def test_episodes_are_chosen_by_arm_and_outcome(served: str, open_page: Callable[..., Page]) -> None:
    page = open_page(served, f"#/episodes/{KEY}", width=400, scheme="dark")
    expect(page.get_by_role("table").filter(has_text="Success by arm")).to_be_visible()
    page.get_by_label("Arm", exact=True).select_option("baseline")
    expect(page.get_by_text("2 episodes, of those chosen")).to_be_visible()
    assert "arm=baseline" in page.url
    page.get_by_label("Outcome").select_option("damaged")
    expect(page.get_by_text("No such episodes")).to_be_visible()
    assert page.evaluate(FITS)


def test_a_copy_holds_tracks_and_says_what_it_lacks(exported: str, open_page: Callable[..., Page]) -> None:
    page = open_page(exported, f"#/episodes/{KEY}/2")
    expect(page.get_by_text("This copy of the page holds films of the first episodes only.").first).to_be_visible()
    expect(page.get_by_role("img", name="Height of the hand")).to_be_visible()
    page.goto(f"{exported}#/episodes/{KEY}?outcome=success")
    expect(page.get_by_text("of those chosen").or_(page.get_by_text("No such episodes"))).to_be_visible()


def test_what_names_say_stays_text(
    run: Run, tmp_path: Path, serve_run: Callable[..., AbstractContextManager[str]], open_page: Callable[..., Page]
) -> None:
    """An arm's name with a script in it, a folder without rollouts, and one whose episodes are gone."""
    evil = "<img src=x onerror=document.title='caught'>"
    shutil.copytree(run.rollouts[KEY].path, tmp_path / "run")
    manifest = (tmp_path / "run" / "manifest.json").read_text()
    (tmp_path / "run" / "manifest.json").write_text(manifest.replace('"no edit"', evil).replace("red-orange", evil))
    shutil.rmtree(tmp_path / "run" / "steps")
    found = Run.open(tmp_path / "run", cache=tmp_path / "cache")
    with serve_run(found) as address:
        page = open_page(address, "#/episodes", expected=("404",))
        expect(page.get_by_label("Task", exact=True)).to_contain_text(evil)
        page.goto(f"{address}#/episodes/run/0")
        expect(page.get_by_text("This cannot be shown")).to_be_visible()
        assert page.title() == "Episodes · Atlas"
    found.close()


def test_without_rollouts_the_view_says_where_they_come_from(
    tmp_path: Path, serve_run: Callable[..., AbstractContextManager[str]], open_page: Callable[..., Page]
) -> None:
    with serve_run(Run.open(tmp_path, cache=tmp_path / "cache")) as address:
        expect(open_page(address, "#/episodes").get_by_text("No rollouts here")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_controls_have_names_and_text_can_be_read(served: str, open_page: Callable[..., Page], scheme: str) -> None:
    page = open_page(served, f"#/episodes/{KEY}/2", scheme=scheme)
    expect(page.locator(".ep-where")).to_contain_text("step")
    nameless = """[...document.querySelectorAll('main input, main select, main button, main video, main svg[role=img]')]
      .filter(e => !(e.labels && e.labels.length) && !e.getAttribute('aria-label') && !e.textContent.trim()).length"""
    assert page.evaluate(nameless) == 0
