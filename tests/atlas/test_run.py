"""What a folder of results holds is found by names and manifests; nothing outside of it is ever read."""

import json
import re
from pathlib import Path

import duckdb
import pytest

from hooked_vla.atlas import run as run_module
from hooked_vla.atlas.run import Run


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_run_is_found_with_what_is_inside(run: Run) -> None:
    assert list(run.experiments) == ["E4"] and run.experiments["E4"].about["experiment"] == "E4"
    labels = sorted(each.name for each in (run.root / "E4" / "rollouts").iterdir())
    assert sorted(run.rollouts) == [f"E4--rollouts--{label}" for label in labels]
    assert all(each.manifest["format"] == "hooked-vla rollouts 1" for each in run.rollouts.values())
    assert not run.empty and not run.indexes and not run.steering


def test_any_part_of_a_run_can_be_opened(run: Run, tmp_path: Path) -> None:
    assert list(Run.open(run.root / "E4", tmp_path).experiments) == ["run"]
    assert list(Run.open(run.root / "E4" / "rollouts" / "main", tmp_path).rollouts) == ["run"]
    assert sorted(Run.open(run.root / "E4" / "rollouts", tmp_path).rollouts)[0] == "main"


def test_indexes_and_steering_are_told_by_their_files(tmp_path: Path) -> None:
    write(tmp_path / "index" / "manifest.json", {"format": "hooked-vla feature index 1", "complete": True})
    write(tmp_path / "steered" / "steered.csv", "arm\n")
    write(tmp_path / "steered" / "rollouts" / "manifest.json", {"format": "hooked-vla rollouts 1"})
    write(tmp_path / "other" / "manifest.json", {"format": "somebody else's"})
    run = Run.open(tmp_path)
    assert (list(run.indexes), list(run.steering), list(run.rollouts)) == (
        ["index"],
        ["steered"],
        ["steered--rollouts"],
    )


@pytest.mark.parametrize("content", ["{", "[1]", '"text"', "\xff", "[" * 100_000])
def test_a_damaged_manifest_is_listed_with_what_is_wrong(tmp_path: Path, content: str) -> None:
    write(tmp_path / "E1" / "experiment.json", content)
    found = Run.open(tmp_path).experiments["E1"]
    assert found.about == {} and found.error is not None and "experiment.json is damaged" in found.error


def test_a_manifest_that_no_run_writes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "MAX_JSON", 10)
    write(tmp_path / "E1" / "experiment.json", {"experiment": "E1", "seed": 700000})
    error = Run.open(tmp_path).experiments["E1"].error
    assert error is not None and "larger" in error


def test_links_numbered_hidden_and_deep_folders_are_not_searched(tmp_path: Path) -> None:
    for place in ("outside", "RUN/000", "RUN/.tmp", "RUN/a/b/c/d/e", "RUN/a/b/c/d"):
        write(tmp_path / place / "experiment.json", {"experiment": place})
    (tmp_path / "RUN" / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "RUN" / "file").mkdir()
    (tmp_path / "RUN" / "file" / "experiment.json").symlink_to(tmp_path / "outside" / "experiment.json")
    assert list(Run.open(tmp_path / "RUN").experiments) == ["a--b--c--d"]


def test_keys_are_segments_of_addresses_and_differ(tmp_path: Path) -> None:
    names = ["<script>", "a b", "a/b", "a--b", "%2e%2e", "x..", "ü", "x" * 150]
    for name in names:
        write(tmp_path / name / "experiment.json", {})
    keys = list(Run.open(tmp_path).experiments)
    assert len(keys) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,120}", key) and key not in (".", "..") for key in keys)


def test_what_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Run.open(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="opens folders"):
        Run.open(tmp_path / "file")
    monkeypatch.setattr(run_module, "MAX_FOLDERS", 2)
    for name in "abcd":
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="more than 2 folders"):
        Run.open(tmp_path)


def test_no_file_outside_is_given_out(tmp_path: Path) -> None:
    root = tmp_path / "RUN"
    write(tmp_path / "secret.txt", "secret")
    write(root / "own.txt", "own")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    (root / "inner.txt").symlink_to(root / "own.txt")
    (root / "loop.txt").symlink_to(root / "loop.txt")
    run = Run.open(root)
    assert run.inside(root / "own.txt").read_text() == run.inside(root / "inner.txt").read_text() == "own"
    for path in (root / "link.txt", root / ".." / "secret.txt", root / "loop.txt", root, root / "missing"):
        with pytest.raises(FileNotFoundError):
            run.inside(path)


def test_duckdb_reads_the_run_and_nothing_else(run: Run, tmp_path: Path) -> None:
    duck = run.duckdb()
    results = run.root / "E4" / "results.parquet"
    found = duck.execute("SELECT count(*) FROM read_parquet(?)", [str(results)]).fetchone()
    assert found is not None and found[0] > 3
    copy = tmp_path / "results.parquet"
    copy.write_bytes(results.read_bytes())
    for query in (f"SELECT * FROM '{copy}'", "SELECT * FROM read_text('/etc/hostname')",
                  f"COPY (SELECT 1) TO '{tmp_path / 'out.csv'}'", "SET enable_external_access = true",
                  f"SELECT * FROM '{results.parent}/../../{tmp_path.name}/results.parquet'"):  # fmt: skip
        with pytest.raises(duckdb.Error):
            duck.execute(query)
    duck.close()


def test_what_is_kept_is_made_once_and_closed_with_the_run(tmp_path: Path) -> None:
    class Kept:
        closed = 0

        def close(self) -> None:
            self.closed += 1

    run = Run.open(tmp_path)
    first = run.keep("it", Kept)
    assert run.keep("it", Kept) is first and run.keep("other", Kept) is not first
    run.close()
    assert first.closed == 1
