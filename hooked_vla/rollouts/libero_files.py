"""What LIBERO reads from disk: its config, without which its import asks on the terminal, and its data files.

The package has code, tasks and starting states. Scenes, meshes and textures are a data set on the hub.
"""

# comes with an extra: where it is absent, importing says so
# pyright: reportMissingImports=false

import importlib.util
import inspect
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

from hooked_vla.folders import user_cache

ASSETS_VARIABLE = "HOOKED_VLA_LIBERO_ASSETS"
CONFIG_VARIABLE = "LIBERO_CONFIG_PATH"
# hf-libero 0.1.4, libero/libero/utils/download_utils.py: HF_ASSETS_REPO_ID
ASSETS_REPO = "lerobot/libero-assets"

# libero.libero.envs.objects: base class -> where it looks for an object's model
_MODEL_FILES = {
    "ArticulatedObject": "articulated_objects/{0}.xml",
    "GoogleScannedObject": "stable_scanned_objects/{0}/{0}.xml",
    "HopeBaseObject": "stable_hope_objects/{0}/{0}.xml",
    "TurbosquidObjects": "turbosquid_objects/{0}/{0}.xml",
}
# libero.libero.envs.problems: problem -> its arena's model
_SCENE_FILES = {
    "libero_coffee_table_manipulation": "scenes/libero_coffee_table_base_style.xml",
    "libero_floor_manipulation": "scenes/libero_floor_base_style.xml",
    "libero_kitchen_tabletop_manipulation": "scenes/libero_kitchen_tabletop_base_style.xml",
    "libero_living_room_tabletop_manipulation": "scenes/libero_living_room_tabletop_base_style.xml",
    "libero_study_tabletop_manipulation": "scenes/libero_study_base_style.xml",
    "libero_tabletop_manipulation": "scenes/libero_tabletop_base_style.xml",
}


def package_folder() -> Path:
    """Where the package's tasks and starting states are, found without importing it.

    Raises ModuleNotFoundError where it is not installed.
    """
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'libero'", name="libero")
    return Path(next(iter(spec.submodule_search_locations))) / "libero"


def ensure_config() -> Path:
    """The folder of LIBERO's config.yaml, which its import needs; where there is none, it is written.

    A folder that LIBERO_CONFIG_PATH names is taken as it is. Without one, the variable is set to a folder of our own
    cache, one for each place that the package is installed at.
    """
    root = package_folder()
    given = os.environ.get(CONFIG_VARIABLE)
    if given:
        folder = Path(given).expanduser()
    else:
        folder = user_cache() / f"libero-{uuid.uuid5(uuid.NAMESPACE_URL, root.as_uri()).hex[:12]}"
        os.environ[CONFIG_VARIABLE] = str(folder)
    file = folder / "config.yaml"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # libero.libero.get_default_path_dict; JSON is YAML
        paths = {
            "benchmark_root": root,
            "bddl_files": root / "bddl_files",
            "init_states": root / "init_files",
            "datasets": root.parent / "datasets",
            "assets": root / "assets",
        }
        unfinished = folder / f"config.{os.getpid()}.partial"
        unfinished.write_text(json.dumps({key: str(path) for key, path in paths.items()}, indent=1))
        unfinished.replace(file)
    return folder


def assets_folder() -> Path:
    """LIBERO's data files: HOOKED_VLA_LIBERO_ASSETS, the package's own, or a download from the hub.

    Raises FileNotFoundError where the variable names no folder, or nothing can be downloaded.
    """
    given = os.environ.get(ASSETS_VARIABLE)
    if given:
        folder = Path(given).expanduser().resolve()
        if not folder.is_dir():
            raise FileNotFoundError(f"{ASSETS_VARIABLE}={given}: there is no such folder")
        return folder
    shipped = package_folder() / "assets"
    return shipped if shipped.is_dir() else _download()


def _download() -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(ASSETS_REPO, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"LIBERO's data files are not here, and the data set {ASSETS_REPO} could not be downloaded from the hub "
            f"({error}). Set {ASSETS_VARIABLE} to a folder that holds them: articulated_objects, scenes, "
            "stable_hope_objects, stable_scanned_objects, textures, turbosquid_objects"
        ) from error


def missing_files(assets: Path, task_file: Path) -> list[str]:
    """What a task (a BDDL file) needs that the data files lack: models, and the meshes that they name.

    Textures are left to MuJoCo: which of those that a model names are used is decided when the scene is put together.
    """
    missing, seen, waiting = set(), set(), _models(task_file)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        file = assets / name
        if not file.is_file():
            missing.add(name)
        elif file.suffix == ".xml":
            meshes = [node.attrib["file"] for node in ElementTree.parse(file).iter("mesh") if "file" in node.attrib]
            waiting += [os.path.normpath(Path(name).parent / mesh) for mesh in meshes]
    return sorted(missing)


@contextmanager
def needed_files(assets: Path, task_file: Path) -> Iterator[None]:
    """Around the making of a task's simulator.

    Raises FileNotFoundError that names what the task needs and the data files lack.
    """
    if missing := missing_files(assets, task_file):
        rest = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise FileNotFoundError(_lacking(assets, task_file, ", ".join(missing[:8]) + rest))
    try:
        yield
    except ValueError as error:
        # MuJoCo's words
        if "opening file" not in str(error):
            raise
        raise FileNotFoundError(_lacking(assets, task_file, f"a file ({error})")) from error


def _lacking(assets: Path, task_file: Path, what: str) -> str:
    return (
        f"the LIBERO data files in {assets} lack {what}, which the task {task_file.stem!r} needs; set "
        f"{ASSETS_VARIABLE} to a complete copy of the data set {ASSETS_REPO}"
    )


def _models(task_file: Path) -> list[str]:
    """The arena's model, and those of the task's objects and fixtures."""
    from libero.libero.envs.objects import get_object_fn

    text = task_file.read_text()
    problem = re.search(r"\(problem\s+(\w+)\s*\)", text)
    if problem is None or problem[1].lower() not in _SCENE_FILES:
        raise ValueError(f"{task_file}: not a LIBERO task; problems: {sorted(_SCENE_FILES)}")
    files = [_SCENE_FILES[problem[1].lower()]]
    for section in re.findall(r"\(:(?:fixtures|objects)([^)]*)\)", text):
        for category in re.findall(r"-\s+(\w+)", section):
            # what the arena itself holds
            if category in ("coffee_table", "floor", "kitchen_table", "living_room_table", "study_table", "table"):
                continue
            kind = get_object_fn(category)
            base = next((name for name in (each.__name__ for each in kind.__mro__) if name in _MODEL_FILES), None)
            if base is not None:
                files.append(_MODEL_FILES[base].format(inspect.signature(kind).parameters["obj_name"].default))
    return files
