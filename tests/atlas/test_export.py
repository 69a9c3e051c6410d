"""A copy of the page holds every answer that the views list, and nothing that a browser would have to ask for."""

import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from hooked_vla.atlas import export as export_module
from hooked_vla.atlas.export import MARKER, export_run
from hooked_vla.atlas.routes import Media, Route, once
from hooked_vla.atlas.run import Run
from hooked_vla.cli import app


def answers(folder: Path) -> list[str]:
    text = (folder / "data" / "index.js").read_text()
    found = re.fullmatch(r"window\.atlasPaths = (.*);\n", text)
    assert found is not None
    return json.loads(found[1])


def test_a_copy_says_what_the_server_says(exported: str, client: TestClient) -> None:
    folder = Path(exported.removeprefix("file://")).parent
    paths = [path for path in answers(folder) if path.startswith(("experiments", "models"))]
    assert {"experiments", "experiments/E4", "experiments/E4/table/results/page/0", "models/smolvla-tabletop"} <= set(
        paths
    )
    figures = [path for path in paths if "/figure/" in path]
    assert figures and len(paths) > 20
    for path in paths:
        told = client.get(f"/api/{path}")
        assert told.status_code == 200, path
        if path in figures:
            assert (folder / "data" / f"{path}.png").read_bytes() == told.content
        else:
            text = (folder / "data" / f"{path}.js").read_text()
            name, said = text.removeprefix("atlas.receive(").removesuffix(");\n").split(", ", 1)
            assert (json.loads(name), json.loads(said)) == (path, told.json())


def test_a_copy_names_no_other_place(exported: str) -> None:
    folder = Path(exported.removeprefix("file://")).parent
    page = html.unescape((folder / "index.html").read_text())
    assert not re.search(r"(src|href)=\"(\w+:)?//", page) and "default-src 'none'" in page and "connect-src" not in page
    for name in re.findall(r'(?:src|href)="([\w./-]+\.(?:js|css))"', page):
        assert (folder / name).is_file(), name
    assert "live.js" not in page


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routes of the tests' own, one of which fails, one has a name that no file can have, and one replays."""

    def broken(run: Run) -> object:
        raise OSError("a disk")

    def all_broken(run: Run) -> Iterator[dict[str, str]]:
        raise OSError("a listing")
        yield {}

    # "image~top": how paths have the token segment image:top
    keys = [{"key": key} for key in ("a", "image~top", "../b", "..")]
    routes = [
        Route("fine/{key}", lambda run, key: key, listing=lambda run: iter(keys)),
        Route("broken", broken, listing=once),
        Route("unlisted", lambda run: 1),
        Route("listing", lambda run: 1, listing=all_broken),
        Route("film", lambda run: Media(b"x", "video/mp4"), listing=once, media="video/mp4", replays=True),
    ]  # fmt: skip
    monkeypatch.setattr(export_module, "all_routes", lambda live: routes)


def test_what_fails_is_told_and_the_rest_is_written(toy: None, tmp_path: Path) -> None:
    (tmp_path / "RUN").mkdir()
    run = Run.open(tmp_path / "RUN")
    done = export_run(run, tmp_path / "PAGE")
    assert answers(tmp_path / "PAGE") == ["broken", "film", "fine/a", "fine/image~top"] and done.files == 4
    assert sorted(text.partition(":")[0] for text in done.errors) == ["broken", "fine/..", "fine/../b", "listing"]
    assert "__error" in (tmp_path / "PAGE" / "data" / "broken.js").read_text()
    assert (tmp_path / "PAGE" / "data" / "film.mp4").read_bytes() == b"x"
    inside = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert inside == {"RUN", "PAGE"}
    export_run(run, tmp_path / "PAGE", replays=False)
    assert answers(tmp_path / "PAGE") == ["broken", "fine/a", "fine/image~top"]
    assert not (tmp_path / "PAGE" / "data" / "film.mp4").exists()


def test_only_a_copy_is_replaced(toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "RUN").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    run = Run.open(tmp_path / "RUN")
    with pytest.raises(FileExistsError, match="something other than a copy"):
        export_run(run, tmp_path / "mine")
    with pytest.raises(ValueError, match="within the run"):
        export_run(run, tmp_path / "RUN" / "PAGE")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x" and not list((tmp_path / "RUN").iterdir())
    export_run(run, tmp_path / "PAGE")
    before = (tmp_path / "PAGE" / MARKER).stat().st_ino

    def full(*arguments: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(export_module, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        export_run(run, tmp_path / "PAGE")
    assert (tmp_path / "PAGE" / MARKER).stat().st_ino == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["PAGE", "RUN", "mine"]


def test_the_command_exports_and_refuses_what_is_no_run(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "E4" / "tables", tmp_path / "E4" / "tables")
    for name in ("experiment.json", "verdicts.json", "report.md", "results.parquet"):
        shutil.copyfile(run_folder / "E4" / name, tmp_path / "E4" / name)
    out = tmp_path / "PAGE"
    done = CliRunner().invoke(app, ["atlas", str(tmp_path / "E4"), "--export", str(out)])
    assert done.exit_code == 0, done.output
    assert str(out / "index.html") in done.output.replace("\n", "") and "experiments/run" in answers(out)
    (tmp_path / "empty").mkdir()
    for folder, text in (("empty", "holds no experiment"), ("missing", "there is no folder")):
        failed = CliRunner().invoke(app, ["atlas", str(tmp_path / folder), "--export", str(tmp_path / "OTHER")])
        assert failed.exit_code == 2 and text in " ".join(re.sub("[│\n]", " ", failed.output).split()), failed.output
    assert not (tmp_path / "OTHER").exists()
