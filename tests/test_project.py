"""The project itself: which way imports go, what the wheel holds, that generated pages are current."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from hooked_vla import get_spec, list_models

ROOT = Path(__file__).parent.parent
# later layers may import earlier ones, never the other way
LAYERS = [
    {"spec", "inputs", "kernels", "extras", "folders", "lerobot", "notebook", "part_files"},
    {"hooks", "components"},
    {"sae.splice"},
    {"interventions"},
    {"models"},
    {"policy"},
    {"processors"},
    {"registry", "weights", "part_files", "model_specs"},
    {"vla"},
    {"describe", "sae", "analysis"},
    {"rollouts"},
    {"training", "serving", "demo_goals", "demo_figures", "demo"},
    {"atlas", "cli"},
]
# these work on any hooked model
HOOKS_ONLY = {"interventions", "sae", "analysis"}


def modules() -> dict[str, Path]:
    """Import name -> file, of everything that the package maps."""
    found = {}
    for folder, package in ((ROOT / "hooked_vla", "hooked_vla"), (ROOT / "kernels" / "ops", "hooked_vla.kernels"),
                            (ROOT / "model_specs", "hooked_vla.model_specs")):  # fmt: skip
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("hooked_vla.")}


def layer_of(name: str) -> int | None:
    """A module's own entry comes before its package's."""
    parts = name.split(".")[1:3]
    return next((i for part in (".".join(parts), parts[0]) for i, layer in enumerate(LAYERS) if part in layer), None)


def test_every_module_has_a_layer_and_imports_go_one_way() -> None:
    wrong = []
    for name, file in modules().items():
        if name == "hooked_vla":
            continue
        own = layer_of(name)
        assert own is not None, f"{name} has no layer in tests/test_project.py"
        for other in imports(file):
            theirs = layer_of(other)
            if theirs is not None and theirs > own:
                wrong.append(f"{name} imports {other}")
            if name.split(".")[1] in HOOKS_ONLY and other.split(".")[1] == "models":
                wrong.append(f"{name} imports {other}: it must work on any hooked model")
    assert not wrong


def test_no_model_is_named_below_models() -> None:
    """Components and hooks know no family; nothing compares anything with a model's name."""
    named = {each for model in list_models() for each in (model, get_spec(model).family)} | {"gemma", "llama", "qwen"}
    for name, file in modules().items():
        if name.split(".")[1:2] in (["components"], ["hooks"], ["models"]):
            for node in ast.walk(ast.parse(file.read_text())):
                tested = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    tested = node.args if node.func.attr in ("startswith", "endswith") else []
                for part in (each for test in tested for each in ast.walk(test)):
                    value = part.value if isinstance(part, ast.Constant) else None
                    assert value not in named, f"{name}:{part.lineno} branches on {value!r}"
        if name.split(".")[1:2] in (["components"], ["hooks"]):
            assert not {other for other in imports(file) if other.split(".")[1] in ("models", "model_specs")}, name


def test_pyproject_lists_every_package() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    needed = {name for name, file in modules().items() if file.name == "__init__.py"}
    missing = [f'    "{name}",' for name in sorted(needed - listed)]
    assert not missing, "add to [tool.setuptools] packages:\n" + "\n".join(missing)
    assert listed == needed


def test_the_wheel_holds_only_the_package(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    copy = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: the list of source files comes from git")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/golden"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([*build, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    outside = [name for name in names if not name.startswith("hooked_vla/") and ".dist-info/" not in name]
    assert not outside
    for needed in ("__init__.py", "py.typed", "kernels/__init__.py", "model_specs/smolvla.py", "models/smolvla.py"):
        assert f"hooked_vla/{needed}" in names


def test_runtime_shape_checks_are_off_for_users() -> None:
    """They are switched on by pytest's option only."""
    code = (
        "import hooked_vla.components.rope as r, torch; "
        "r.rotate(torch.zeros(1, 2, 3, 4), r.Rotation(1.0, 0.0)); print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


def test_generated_pages_are_current() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    from generate import PAGES

    for file, make in PAGES.items():
        assert (ROOT / "docs" / file).read_text() == make(), f"docs/{file} is out of date: run `make docs`"


def test_the_project_speaks_of_itself_alone() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("not a git checkout: the list of source files comes from git")
    needle = ["/" + "work/", "/" + "root/", "/" + "home/"]
    for name in listed:
        file = ROOT / name
        if file.suffix in (".py", ".md", ".toml", ".json", ".txt", "") and file.is_file() and "golden" not in name:
            text = file.read_text(errors="ignore")
            assert not [each for each in needle if each in text], name
