"""The tables of experiments are told as they are: what is not measured is not there, what is damaged says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from starlette.testclient import TestClient

from hooked_vla.atlas.routes import NotThere
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views import experiments, tables
from hooked_vla.atlas.views.columns import roles


@pytest.fixture
def own(run_folder: Path, tmp_path: Path) -> Path:
    """A run of the test's own, without episodes."""
    for name in ("tables", "figures"):
        shutil.copytree(run_folder / "E4" / name, tmp_path / "RUN" / "E4" / name)
    for path in (run_folder / "E4").glob("*.*"):
        shutil.copyfile(path, tmp_path / "RUN" / "E4" / path.name)
    return tmp_path / "RUN" / "E4"


def opened(folder: Path) -> Run:
    return Run.open(folder.parent, folder.parent.parent / "cache")


def test_an_experiment_is_told_as_its_files_have_it(run: Run) -> None:
    folder = run.root / "E4"
    one = experiments.experiment(run, "E4")
    verdicts = json.loads((folder / "verdicts.json").read_text())
    assert one["title"] == verdicts["title"] and one["labels"] == verdicts["labels"] and one["finished"]
    assert {rule["id"]: rule["measured"] for rule in one["rules"]} == {
        rule: said["measured"] for rule, said in verdicts["verdicts"].items()
    }
    assert {rule["verdict"] for rule in one["rules"]} == {"not judged"}
    assert one["question"].startswith("Told its own task, does the policy")
    assert one["published"].startswith("Action Atlas") and "Headline" in one["limits"]
    assert one["tables"][0]["name"] == "results" and one["settings"]["episodes"] == 2
    assert {each["name"]: each["file"] for each in one["figures"]}["success"] == "E4/figures/success.png"
    assert all(each["caption"] for each in one["figures"])
    assert any(label.startswith("replay") for label in one["labels"])


def test_pages_have_every_row_and_number_it(run: Run) -> None:
    frame = pd.read_parquet(run.root / "E4" / "tables" / "episodes.parquet")
    page = experiments.table_page(run, "E4", "episodes", "0")
    assert page["columns"] == list(frame.columns) and page["total"] == len(frame) <= page["size"]
    assert page["numbers"] == list(range(len(frame))) and page["file"] == "E4/tables/episodes.parquet"
    assert [row[1] for row in page["rows"]] == frame["arm"].tolist()
    assert experiments.table_page(run, "E4", "episodes", "1")["rows"] == []


def test_the_rows_of_a_cell_are_those_with_its_values(run: Run) -> None:
    frame = pd.read_parquet(run.root / "E4" / "tables" / "episodes.parquet")
    found = experiments.rows(run, "E4", "episodes", json.dumps({"arm": "expert"}), "")
    assert found["numbers"] == frame.index[frame["arm"] == "expert"].tolist() and found["total"] == 2
    blank = experiments.rows(run, "E4", "results", json.dumps({"holm_p": None, "arm": "baseline"}), "0")
    assert blank["total"] == 1
    hostile = experiments.rows(run, "E4", "results", json.dumps({"arm": "x' OR 1=1 --"}), "0")
    assert hostile["total"] == 0
    for where, text in (("{", "not JSON"), ("[]", "must be an object"), ('{"arm": {}}', "plain values"),
                        ('{"arm\\" OR true --": 1}', "no columns")):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            experiments.rows(run, "E4", "results", where, "0")


def test_cells_are_means_of_their_rows_and_the_others_are_blank(own: Path) -> None:
    frame = pd.DataFrame({"a": ["x", "x", "y", "y"], "layer": [2, 2, 10, 2], "score": [1.0, 2.0, None, float("inf")],
                          "low": [0.0, 1.0, 0.1, 0.2], "high": [3.0, 4.0, 0.3, 0.4], "n": [1, 2, 3, 4]})  # fmt: skip
    frame.to_parquet(own / "tables" / "made.parquet")
    run = opened(own)
    about = tables.describe(run, own / "tables" / "made.parquet")
    assert [(each["name"], each["role"], each["of"]) for each in about["columns"]] == [
        ("a", "key", None), ("layer", "key", None), ("score", "measure", None), ("low", "low", "score"),
        ("high", "high", "score"), ("n", "count", None),
    ]  # fmt: skip
    score = about["columns"][2]
    assert (score["low"], score["high"]) == (1.0, 2.0)
    found = tables.grid(run, own / "tables" / "made.parquet", 2, 0, 1)
    assert (found["rows"], found["columns"]) == (["x", "y"], [2, 10])
    # two rows have no interval; a blank value and an infinite one are blank; x at layer 10 is no cell
    assert found["cells"] == [[0, 0, 1.5, 2, None, None], [1, 1, None, 1, 0.1, 0.3], [1, 0, None, 1, 0.2, 0.4]]
    for wrong in ((0, 0, 1), (2, 0, 0), (2, 0, 5), (2, 2, 1), (9, 0, 1)):
        with pytest.raises(NotThere):
            tables.grid(run, own / "tables" / "made.parquet", *wrong)


def test_a_heat_map_begins_with_keys_that_fill_it(run: Run, own: Path) -> None:
    made = opened(own)
    frame = pd.DataFrame([{"arm": f"arm {i}", "task": f"task {j}", "seed": k, "success": 1.0, "alone": f"arm {i}"}
                          for i in range(4) for j in range(3) for k in range(3)])  # fmt: skip
    frame.to_parquet(own / "tables" / "made.parquet")
    about = tables.describe(made, own / "tables" / "made.parquet")
    # seeds are what means are taken over, and a key that repeats another makes a diagonal
    assert [about["columns"][about["grid"][side]]["name"] for side in ("rows", "columns")] in (
        ["arm", "task"], ["alone", "task"],
    )  # fmt: skip
    frame[["arm", "success"]].drop_duplicates().to_parquet(own / "tables" / "made.parquet")
    assert tables.describe(made, own / "tables" / "made.parquet")["grid"] is None


def test_columns_are_told_by_their_names() -> None:
    names = {"success": "number", "success_low": "number", "success_high": "number", "baseline_success": "number",
             "displacement": "number", "floor": "number", "mcnemar_p": "number", "n": "integer", "n_tasks": "integer",
             "label": "text", "arm": "text", "zero_effect": "bool", "seed": "integer", "poses": "other",
             "nearer": "number", "chance": "number"}  # fmt: skip
    found = {each.name: (each.role, each.of) for each in roles(list(names.items()))}
    assert found == {
        "success": ("measure", None), "success_low": ("low", "success"), "success_high": ("high", "success"),
        "baseline_success": ("reference", "success"), "displacement": ("measure", None),
        "floor": ("reference", "displacement"), "mcnemar_p": ("p", None), "n": ("count", None),
        "n_tasks": ("count", None), "label": ("label", None), "arm": ("key", None), "zero_effect": ("flag", None),
        "seed": ("key", None), "poses": ("note", None), "nearer": ("measure", None), "chance": ("measure", None),
    }  # fmt: skip


def test_several_models_of_one_experiment_know_each_other(own: Path) -> None:
    shutil.copytree(own, own.parent / "E4-other")
    about = json.loads((own / "experiment.json").read_text())
    about["model"]["name"] = "folder/other-model"
    (own.parent / "E4-other" / "experiment.json").write_text(json.dumps(about))
    alike = experiments.experiment(opened(own), "E4")["alike"]
    assert alike == [{"key": "E4", "model": "smolvla-tabletop"}, {"key": "E4-other", "model": "other-model"}]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all", b"PAR1" + bytes(range(256)) * 9 + b"PAR1",
                                     b"PAR1\xff\xff\xff\xff\xff\xff\xff\x7fPAR1", "cut", "turned"])  # fmt: skip
def test_malformed_parquet_is_an_error_and_the_rest_is_there(
    own: Path, make_client: Callable[..., TestClient], content: bytes | str
) -> None:
    path = own / "results.parquet"
    whole = path.read_bytes()
    if content == "cut":
        content = whole[: len(whole) // 2]
    elif content == "turned":
        content = whole[:100] + bytes(255 - byte for byte in whole[100:900]) + whole[900:]
    assert isinstance(content, bytes)
    path.write_bytes(content)
    client = make_client(opened(own))
    one = client.get("/api/experiments/E4").json()
    about = client.get("/api/experiments/E4/table/results").json()
    page = client.get("/api/experiments/E4/table/results/page/0")
    # the last one has a whole footer: only who reads its rows sees that they are damaged
    assert about["error"] or page.status_code == 500, "damage that nobody sees"
    assert page.status_code == 500 and "error" in page.json()
    assert len(one["tables"]) > 2 and client.get("/api/experiments/E4/table/episodes").json()["error"] is None


def test_damaged_texts_are_told(own: Path) -> None:
    (own / "verdicts.json").write_text("[")
    (own / "report.md").write_bytes(b"\xff\xfe")
    (own / "figures" / "success.png").unlink()
    (own / "figures" / "success.png").symlink_to("/etc/passwd")
    run = opened(own)
    one = experiments.experiment(run, "E4")
    assert "verdicts.json is damaged" in one["error"] and "report.md cannot be read" in one["report_error"]
    assert not one["finished"] and {rule["verdict"] for rule in one["rules"]} == {"not finished"}
    with pytest.raises(FileNotFoundError, match="not a file of this run"):
        experiments.figure(run, "E4", "success")
    for ask in (experiments.experiment, lambda run, key: experiments.table(run, "E4", key)):
        with pytest.raises(NotThere):
            ask(run, "nothing")
