import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from hooked_vla.rollouts import libero_files
from hooked_vla.rollouts.libero_files import (
    ASSETS_REPO,
    ASSETS_VARIABLE,
    CONFIG_VARIABLE,
    assets_folder,
    ensure_config,
    needed_files,
)


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch) -> Path:
    """Where the package would be; nothing of the user's own folders is read."""
    root = tmp_path / "site-packages" / "libero" / "libero"
    root.mkdir(parents=True)
    monkeypatch.setattr(libero_files, "package_folder", lambda: root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(ASSETS_VARIABLE, raising=False)
    # set first, so that what is set under test is undone
    monkeypatch.setenv(CONFIG_VARIABLE, "")
    return root


def test_config_is_written_once_into_the_cache(package, tmp_path):
    folder = ensure_config()
    assert folder.is_relative_to(tmp_path / "cache")
    assert [file.name for file in folder.iterdir()] == ["config.yaml"]
    paths = json.loads((folder / "config.yaml").read_text())
    assert paths["bddl_files"] == str(package / "bddl_files") and paths["init_states"] == str(package / "init_files")
    assert set(paths) == {"benchmark_root", "bddl_files", "init_states", "datasets", "assets"}
    written = (folder / "config.yaml").stat().st_mtime_ns
    assert ensure_config() == folder and (folder / "config.yaml").stat().st_mtime_ns == written


def test_each_installation_has_its_config(tmp_path, monkeypatch):
    first = ensure_config()
    monkeypatch.setenv(CONFIG_VARIABLE, "")
    monkeypatch.setattr(libero_files, "package_folder", lambda: tmp_path / "elsewhere")
    assert ensure_config() != first


def test_the_users_config_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("bddl_files: mine")
    monkeypatch.setenv(CONFIG_VARIABLE, str(tmp_path))
    assert ensure_config() == tmp_path
    assert (tmp_path / "config.yaml").read_text() == "bddl_files: mine"


def test_folder_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(ASSETS_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"HOOKED_VLA_LIBERO_ASSETS=.*nowhere: there is no such folder"):
        assets_folder()


def test_where_data_files_come_from(package, tmp_path, monkeypatch):
    asked = []

    def download(*args, **kwargs):
        asked.append((args, kwargs))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert assets_folder() == tmp_path / "hub"
    assert asked == [((ASSETS_REPO,), {"repo_type": "dataset"})]
    (package / "assets").mkdir()
    assert assets_folder() == package / "assets"
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv(ASSETS_VARIABLE, str(tmp_path / "mine"))
    assert assets_folder() == tmp_path / "mine"
    assert len(asked) == 1


def test_download_that_fails_says_what_to_do(monkeypatch):
    def download(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match=rf"{ASSETS_REPO} could not be downloaded.*Set {ASSETS_VARIABLE}"):
        assets_folder()


def test_missing_files_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(libero_files, "missing_files", lambda *_: [f"scenes/{i}.xml" for i in range(10)])
    with (
        pytest.raises(
            FileNotFoundError, match=r"lack scenes/0\.xml, .*scenes/7\.xml and 2 more, which the task 'pour'"
        ),
        needed_files(tmp_path, Path("pour.bddl")),
    ):
        raise AssertionError("not reached")


def test_texture_that_mujoco_misses_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(libero_files, "missing_files", lambda *_: [])
    with (
        pytest.raises(FileNotFoundError, match=r"Error opening file 'wood\.png'.*'pour'"),
        needed_files(tmp_path, Path("pour.bddl")),
    ):
        raise ValueError("Error: Error opening file 'wood.png': No such file or directory")
    with pytest.raises(ValueError, match="mass must be positive"), needed_files(tmp_path, Path("pour.bddl")):
        raise ValueError("mass must be positive")
