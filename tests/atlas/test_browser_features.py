"""Features in a browser: the map, search, a feature's page, served and as a copy; a hostile run stays text."""

import re
import shutil

import pytest
from feature_runs import HOSTILE, N_FEATURES, STEERED, describe_all, feature_run
from waiting import until

from hooked_vla.atlas import export
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views import feature_pictures, features


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run in which every feature of one index has a script for its description."""
    folder = tmp_path_factory.mktemp("hostile") / "RUN"
    shutil.copytree(feature_run(tmp_path_factory)[0], folder)
    describe_all(folder / "vlm", HOSTILE)
    run = Run.open(folder, cache=folder.parent / "cache")
    yield run
    run.close()


@pytest.fixture(scope="module")
def address(hostile, serve_run):
    with serve_run(hostile, live=False) as found:
        yield found


@pytest.fixture(scope="module")
def copy(hostile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "PAGE"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(features, "EXPORTED", 2)
        patched.setattr(feature_pictures, "EXPORTED_EPISODES", 1)
        # films of all episodes are another view's
        patched.setattr(export, "all_routes", lambda live: [*features.ROUTES, *feature_pictures.ROUTES])
        export.export_run(hostile, folder)
    return (folder / "index.html").as_uri()


def drawn_dots(page, n: int = 2) -> None:
    until(page, f"document.querySelectorAll('.dots[data-drawn]').length === {n}")


def sideways(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def test_the_list_searches_colours_and_opens(open_page, address):
    page = open_page(address, "#/features/expert")
    drawn_dots(page)
    until(page, "document.querySelectorAll('.dots')[0].dataset.drawn === '40'")
    assert page.locator(".feature-table tbody tr").count() == N_FEATURES
    page.get_by_role("combobox", name="Colour").select_option("phase")
    assert "none stands out" in page.locator(".legend").inner_text()
    page.get_by_label(re.compile("Search descriptions")).fill(str(STEERED))
    until(page, f"document.querySelector('.feature-table tbody a').textContent === '{STEERED}'")
    assert f"q={STEERED}" in page.url and "color=phase" in page.url
    # the address alone shows the same again
    page.reload()
    drawn_dots(page)
    page.wait_for_selector(".feature-table tbody a")
    assert page.locator(".feature-table tbody a").first.inner_text() == str(STEERED)
    assert page.get_by_role("combobox", name="Colour").input_value() == "phase"
    page.locator(".feature-table tbody a").first.press("Enter")
    page.wait_for_selector("h1:has-text('Feature 7')")
    page.locator("body").press("ArrowRight")
    page.wait_for_selector("h1:has-text('Feature 8')")


def test_points_are_opened_by_mouse_and_keyboard(open_page, address):
    page = open_page(address, "#/features/expert")
    drawn_dots(page)
    canvas = page.locator(".dots canvas").nth(1)
    canvas.focus()
    canvas.press("ArrowRight")
    told = page.locator(".dots-tip").nth(1).inner_text()
    feature = re.match(r"Feature (\d+)", told)
    assert feature and "generality" in told
    canvas.press("Enter")
    page.wait_for_selector(f"h1:has-text('Feature {feature[1]}')")


def test_a_feature_shows_its_tokens_on_what_the_camera_saw(open_page, address):
    page = open_page(address, "#/features/vlm/3")
    until(
        page,
        "[...document.querySelectorAll('.plan')].length && [...document.querySelectorAll('.picture')].every("
        "(each) => each.querySelector('img')?.naturalWidth === 96)",
        seconds=120,
    )
    assert page.locator(".plan .picture canvas").count() == 2 * page.locator(".plan").count()
    assert page.locator(".js-plotly-plot").count() >= 2
    page.get_by_role("combobox", name="Plans").select_option("across")
    until(page, "document.querySelector('.plan h4').textContent.includes('25 %')")
    assert "plans=across" in page.url


def test_steering_stands_beside_its_controls(open_page, address):
    page = open_page(address, f"#/features/expert/{STEERED}", width=400, scheme="dark")
    page.wait_for_selector("text=Every arm, beside its controls")
    arms = page.locator("[aria-label=Arms] tbody tr td:first-child").all_inner_texts()
    assert {"baseline", "sham", "feature +0.5", "random 0 +0.5"} <= set(arms)
    until(page, "document.querySelectorAll('.feature-doses .js-plotly-plot').length === 4")
    assert sideways(page) <= 0
    assert page.locator(".strip.low").count() > 0
    page.get_by_label("Denoise step").select_option("0")
    until(page, "!document.querySelector('.strip.low')")


def test_a_copy_shows_the_same_without_a_network(open_page, copy):
    page = open_page(copy, "#/features/vlm", width=400)
    drawn_dots(page)
    assert sideways(page) <= 0
    page.wait_for_selector(".feature-table tbody a")
    assert page.locator(".feature-table tbody tr").count() == N_FEATURES
    # what was not kept is no link
    assert page.locator(".feature-table tbody a").count() == 2
    page.get_by_label(re.compile("Search descriptions")).fill("nothing has this")
    page.wait_for_selector("text=Nothing found")
    page = open_page(copy, f"#/features/expert/{STEERED}")
    page.wait_for_selector("text=Every arm, beside its controls")


def test_a_hostile_description_stays_text(open_page, address, copy):
    for place in (address, copy):
        page = open_page(place, "#/features/vlm")
        drawn_dots(page)
        page.wait_for_selector(".feature-table tbody tr")
        assert HOSTILE in page.locator(".feature-table").inner_text()
        page.locator(".dots canvas").first.focus()
        page.locator(".dots canvas").first.press("ArrowRight")
        assert HOSTILE in page.locator(".dots-tip").first.inner_text()
        page.locator(".feature-table tbody a").first.click()
        page.wait_for_selector(".feature-says")
        assert HOSTILE in page.locator(".feature-says").inner_text()
        assert page.title() != "owned" and page.locator("img[src=x]").count() == 0


def test_a_run_without_features_says_how_to_make_some(open_page, served):
    page = open_page(served, "#/features")
    assert "No feature index here" in page.locator("main").inner_text()


def test_every_control_and_picture_has_a_name(open_page, address):
    for place in ("#/features/expert", f"#/features/expert/{STEERED}"):
        page = open_page(address, place)
        page.wait_for_selector("table")
        nameless = page.evaluate(
            "[...document.querySelectorAll('main :is(select, input, canvas, button, [role=img])')].filter("
            "(each) => !each.getAttribute('aria-label') && !each.labels?.length && !each.textContent.trim()).map("
            "(each) => each.outerHTML.slice(0, 90))"
        )
        assert not nameless
