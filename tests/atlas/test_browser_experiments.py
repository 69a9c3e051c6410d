"""Experiments in a browser: live and from a copy, with data and without, by keyboard, and from a hostile folder."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pandas as pd
import pytest
from accessible import hidden_focus, problems
from playwright.sync_api import Page, expect

from hooked_vla.atlas.run import Run

Visit = Callable[[Page, str], Page]
Serve = Callable[..., AbstractContextManager[str]]
SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(params=["served", "exported"])
def address(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


def test_from_the_overview_to_the_rows_of_a_cell(open_page: Callable[..., Page], address: str) -> None:
    page = open_page(address, "#/experiments")
    expect(page.get_by_role("heading", level=1)).to_have_text("Experiments")
    row = page.get_by_role("row").filter(has_text="Cross-task injection")
    expect(row.get_by_text("replay", exact=True)).to_be_visible()
    expect(row.get_by_text("dead end", exact=True)).to_be_visible()
    page.get_by_role("link", name="E4 with smolvla-tabletop").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("E4: Cross-task injection")
    expect(page.get_by_text("not judged", exact=True)).to_have_count(3)
    cell = page.get_by_role("link", name="success of expert:")
    expect(cell).to_contain_text("0 – 0.658")
    # its control stands in the same cell, and its file above
    expect(cell).to_contain_text("noise")
    expect(page.get_by_role("region", name="E4, results").locator("caption")).to_contain_text("E4/results.parquet")
    cell.click()
    expect(page.locator("caption").filter(has_text="results: 1 row")).to_contain_text("from E4/results.parquet")
    assert "where=" in page.url
    # the address restores what was seen
    page.reload()
    expect(page.locator("caption").filter(has_text="results: 1 row")).to_be_visible()
    page.get_by_role("link", name="All rows").click()
    expect(page.locator("caption").filter(has_text="results: ")).to_contain_text("rows")


def test_a_row_leads_to_the_episodes_that_it_was_measured_on(open_page: Callable[..., Page], address: str) -> None:
    page = open_page(address, "#/experiments/E4")
    page.get_by_role("link", name="success of expert:").click()
    page.get_by_role("link", name="2 episodes", exact=True).click()
    expect(page.get_by_label("Arm", exact=True)).to_have_value("expert")
    expect(page.get_by_text("2 episodes, of those chosen")).to_be_visible()
    # a row of one episode leads to that, beside its baseline
    page.goto(f'{address}#/experiments/E4/episodes?as=rows&where={{"arm":"expert"}}')
    expect(page.locator("caption").filter(has_text="episodes: 2 rows")).to_be_visible()
    page.get_by_role("cell").get_by_role("link", name="episode ").first.click()
    expect(page.get_by_label("This arm")).to_contain_text("expert")
    expect(page.get_by_label("Beside it")).to_have_value("baseline")


def test_a_measure_over_two_keys(open_page: Callable[..., Page], address: str) -> None:
    page = open_page(address, "#/experiments/E4/episodes")
    expect(page.get_by_label("Show")).to_have_value("grid")
    page.get_by_label("Measure").select_option("cos_src")
    table = page.locator("table.heat-table")
    expect(table.locator("caption")).to_contain_text("cos src")
    cells = table.locator("td.heat a")
    assert cells.count() > 4
    cells.first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("caption").filter(has_text="episodes: ")).to_contain_text("E4/tables/episodes.parquet")


def test_figures_are_those_of_the_report(open_page: Callable[..., Page], address: str) -> None:
    page = open_page(address, "#/experiments/E4")
    figures = page.locator(".figures img")
    assert figures.count() >= 1
    for i in range(figures.count()):
        figures.nth(i).scroll_into_view_if_needed()
        expect(figures.nth(i)).to_have_js_property("complete", True)
        assert figures.nth(i).evaluate("node => node.naturalWidth") > 100


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_everyone_can_read_it(
    open_page: Callable[..., Page], visit: Visit, served: str, width: int, scheme: str
) -> None:
    page = open_page(served, "#/experiments", width=width, scheme=scheme)
    assert problems(page) == []
    for place in ("E4", "E4/episodes?as=rows"):
        assert problems(visit(page, f"#/experiments/{place}")) == []
    assert hidden_focus(page) == []


def test_keys_move_between_views_and_say_what_they_do(open_page: Callable[..., Page], served: str) -> None:
    page = open_page(served, "#/experiments")
    page.keyboard.press("m")
    expect(page.get_by_role("heading", level=1)).to_have_text("Models")
    page.keyboard.press("x")
    expect(page.get_by_role("heading", level=1)).to_have_text("Experiments")
    page.keyboard.press("1")
    expect(page.get_by_role("heading", level=1)).to_have_text("Models")
    page.keyboard.press("?")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    assert problems(page) == []
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    # what is typed into a field is no command
    page.goto(served + "#/experiments/E4")
    page.get_by_label("Show").focus()
    page.keyboard.press("m")
    expect(page.get_by_role("heading", level=1)).to_contain_text("E4")


def test_nothing_is_said_where_nothing_is(open_page: Callable[..., Page], serve_run: Serve, tmp_path: Path) -> None:
    (tmp_path / "RUN").mkdir()
    run = Run.open(tmp_path / "RUN", tmp_path / "cache")
    with serve_run(run) as address:
        page = open_page(address, "#/experiments")
        expect(page.get_by_role("heading", name="No experiments in this run")).to_be_visible()
        page = open_page(address, "#/experiments/nothing", expected=("404",))
        expect(page.get_by_text("this run has no experiment 'nothing'")).to_be_visible()
        assert problems(page) == []
    run.close()


def test_a_server_that_went_away_is_told(open_page: Callable[..., Page], run: Run, serve_run: Serve) -> None:
    with serve_run(run) as address:
        page = open_page(address, "#/experiments", expected=("ERR_", "failed: "))
    page.get_by_role("link", name="E4 with smolvla-tabletop").click()
    expect(page.get_by_text("The server does not answer")).to_be_visible()


def hostile(run_folder: Path, root: Path) -> Path:
    """A run whose every text is a script and whose tables are damaged, each in its own way."""
    folder = root / "<b>E4"
    shutil.copytree(run_folder / "E4" / "tables", folder / "tables")
    about = json.loads((run_folder / "E4" / "experiment.json").read_text())
    about["experiment"] = about["model"]["name"] = SCRIPT
    about["settings"] = {SCRIPT: SCRIPT}
    about["rules"] = [{"id": SCRIPT, "text": SCRIPT}]
    (folder / "experiment.json").write_text(json.dumps(about))
    said = {"title": SCRIPT, "labels": [f"replay {SCRIPT}"], "verdicts": {SCRIPT: {"holds": True, "measured": SCRIPT}}}
    (folder / "verdicts.json").write_text(json.dumps(said))
    (folder / "report.md").write_text(
        f"# {SCRIPT}\n\n{SCRIPT}\n\n![{SCRIPT}](figures/x.png)\n\n## Limits\n\n- {SCRIPT}\n"
    )
    frame = pd.DataFrame(
        {"arm": [SCRIPT, "b"], SCRIPT: [SCRIPT, "a"], "success": [1.0, 0.5], "label": [SCRIPT, "open"]}
    )
    frame.to_parquet(folder / "results.parquet")
    (folder / "tables" / "episodes.parquet").write_bytes(b"PAR1" + b"\xff" * 300 + b"PAR1")
    (root / "E5").mkdir()
    (root / "E5" / "experiment.json").write_text("{")
    return root


def test_a_hostile_folder_runs_nothing_and_the_rest_is_shown(
    open_page: Callable[..., Page], visit: Visit, run_folder: Path, serve_run: Serve, tmp_path: Path
) -> None:
    run = Run.open(hostile(run_folder, tmp_path / "RUN"), tmp_path / "cache")
    key = next(iter(run.experiments))
    with serve_run(run) as address:
        page = open_page(address, "#/models")
        shown = {}
        for place in ("", f"/{key}", f"/{key}/results?as=rows", f"/{key}/episodes", "/E5"):
            shown[place] = visit(page, f"#/experiments{place}").locator("main").inner_text()
            assert page.evaluate("() => window.hacked") is None
            assert page.locator("main script, main img[src=x]").count() == 0
        assert "<script>window.hacked = 1</script>" in shown[f"/{key}"]
        assert SCRIPT in shown[f"/{key}/results?as=rows"]
        assert "This table cannot be read" in shown[f"/{key}/episodes"]
        assert "experiment.json is damaged" in shown["/E5"]
    run.close()


def test_several_models_stand_side_by_side(
    open_page: Callable[..., Page], run_folder: Path, serve_run: Serve, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        shutil.copytree(run_folder / "E4" / "tables", tmp_path / "RUN" / name / "tables")
        shutil.copyfile(run_folder / "E4" / "verdicts.json", tmp_path / "RUN" / name / "verdicts.json")
        about = json.loads((run_folder / "E4" / "experiment.json").read_text())
        about["model"]["name"] = f"{name}-model"
        (tmp_path / "RUN" / name / "experiment.json").write_text(json.dumps(about))
        frame = pd.read_parquet(run_folder / "E4" / "results.parquet")
        # the second never ran that arm
        frame = frame if name == "first" else frame[frame["arm"] != "vlm:middle"]
        frame.to_parquet(tmp_path / "RUN" / name / "results.parquet")
    run = Run.open(tmp_path / "RUN", tmp_path / "cache")
    with serve_run(run) as address:
        page = open_page(address, "#/experiments/first/results?as=models&measure=success")
        table = page.locator("table.heat-table")
        expect(table.get_by_role("columnheader")).to_contain_text(["first-model", "second-model"])
        row = table.get_by_role("row").filter(has_text="vlm:middle")
        expect(row.locator("td.heat")).to_have_count(1)
        expect(row.locator("td.blank")).to_have_count(1)
        assert problems(page) == []
    run.close()
