"""The Python on every page runs; what a page takes for granted is set up here, and what it says is looked at after."""

import ast
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import PAGES, ROOT, python_blocks, run
from public_checkpoints import make_observation
from unchecked import unchecked_shapes

from hooked_vla import HookedVLA, Observation, registry

# a page whose code is pieces of files, and those files: every line of it stands in one of them
PIECES = {
    "docs/add_a_model.md": ("model_specs/smolvla.py", "hooked_vla/models/smolvla.py", "hooked_vla/components/block.py")
}
TESTED = {
    "README.md", "docs/analysis.md", "docs/from_transformer_lens.md", "docs/interventions.md", "docs/simulators.md",
    "docs/tour.md", "kernels/README.md",
}  # fmt: skip
# its commands run too, one on what the other wrote
ELSEWHERE = {"docs/saes.md": "tests/rollouts/sae/test_saes_page.py"}


@pytest.fixture(autouse=True)
def _as_a_reader_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a folder of their own, with gradients on, and every warning an error: a page that warns should say so. Without
    runtime shape checks, which other tests have, and which take most of the time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOOKED_VLA_RENDER", "fast")
    with unchecked_shapes(), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("error")
        # not ours: packages that import others by old names
        warnings.simplefilter("default", DeprecationWarning)
        yield


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_page_with_python_is_tested() -> None:
    assert {page for page in PAGES if python_blocks(page)} == TESTED | set(PIECES) | set(ELSEWHERE)
    for page, test in ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text()


def test_readme() -> None:
    """Its checkpoint is on the hub: a model with its cameras, state and layers stands in."""
    spec: Any = registry.get_spec("smolvla", "tiny")
    features = replace(spec.features, cameras=("camera1", "camera2", "camera3"), d_state=6, d_action=6)
    vlm = replace(spec.vlm, n_layers=16)
    expert = replace(spec.expert, decoder=replace(spec.expert.decoder, n_layers=16), schedule=("joint", "cross") * 8)
    spec = replace(spec, features=features, vlm=vlm, expert=expert)
    model = HookedVLA.from_network(spec, registry.build_network(spec).eval()).requires_grad_(False)
    image = torch.randint(0, 256, (48, 80, 3), dtype=torch.uint8).numpy()
    other = Observation({f"camera{i}": image for i in (1, 2, 3)}, draw(6), "pick up the tan block")
    names = run(
        "README.md", {"model_from_the_hub": model, "image": image, "state": draw(6), "other_obs": other},
        {'HookedVLA.from_pretrained("lerobot/smolvla_base")': "model_from_the_hub"},
    )  # fmt: skip
    assert names["cache"]["vlm.blocks.8.hook_resid_post"].segment("language").shape[0] == 1
    assert not torch.equal(names["patched"].chunk, model(other).chunk)


def test_analysis() -> None:
    names = run("docs/analysis.md", {})
    exact = names["exact"].table
    words = exact[(exact.site == "vlm.blocks.0.hook_resid_pre") & (exact.segment == "language")]
    # the two runs differ in the instruction alone, so at the bottom its tokens are all of the difference
    assert torch.allclose(torch.tensor(words.effect.tolist()), torch.ones(len(words)), atol=1e-5)
    assert names["shares"].error < 1e-4


def test_interventions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = HookedVLA.from_spec("smolvla", "tiny").requires_grad_(False)
    d, same = 64, ["put the red block on the tray"] * 4
    _, cache_all = model.run_with_cache(make_observation(1, seed=7, instruction=same[:1]), "vlm.*.hook_resid_post")
    names = run("docs/interventions.md", {
        "model": model, "folder": tmp_path, "cache_all": cache_all, "direction": draw(d),
        "obs": make_observation(), "other_obs": make_observation(seed=3), "noise": draw(2, 8, 8),
        "four_copies": make_observation(4, instruction=same), "noise_of_four": draw(4, 8, 8, seed=1),
        "w_enc": draw(16, d, seed=2), "b_enc": torch.zeros(16), "w_dec": draw(16, d, seed=3), "b_dec": torch.zeros(d),
        "threshold": torch.zeros(16), "mean": draw(d, seed=4), "std": torch.ones(1),
    })  # fmt: skip
    assert not torch.equal(names["weak"].chunk, names["strong"].chunk)
    assert torch.equal(names["same"], names["weak"].chunk)
    swept, plain = names["swept"].chunk, model(names["four_copies"], names["noise_of_four"]).chunk
    assert all(not torch.equal(swept[i], plain[i]) for i in (1, 2, 3))
    assert "2 edits at 2 hook points\n  steer: AddRelative 2 × ‖x‖" in capsys.readouterr().out


def test_tour() -> None:
    names = run("docs/tour.md", {})
    assert 0.5 < names["recovery"](names["patched"], names["own"], names["donor"]).item() < 1.5
    assert names["done"].summary["baseline"].overall.successes > names["done"].summary["no words"].overall.successes
    assert not torch.equal(names["without"].normalized, names["donor"])


def test_from_transformer_lens(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("docs/from_transformer_lens.md", {})
    assert "the whole residual stream of vlm at block 0" in capsys.readouterr().out
    assert names["last"]["expert.blocks.0.hook_resid_pre"].shape[0] == 1


def test_names_in_the_table_for_transformer_lens_users() -> None:
    """What the right column calls by its full name is there."""
    model = HookedVLA.from_spec("smolvla", "tiny")
    text = (ROOT / "docs" / "from_transformer_lens.md").read_text()
    rows = re.findall(r"^\| .* \| (.*) \|$", text, re.MULTILINE)
    called = {each for row in rows for each in re.findall(r"\b(?:model|cache)\.(\w+)", row)}
    assert len(called) > 10
    _, cache = model.run_with_cache(make_observation(), "vlm.*")
    missing = {each for each in called if not (hasattr(model, each) or hasattr(cache, each))}
    assert not missing


def test_simulators() -> None:
    """On the tabletop, which needs no simulator of its own; tests/sims drives the others."""
    stand_ins = {'"metaworld"': '"goal"', '"drawer-open"': '"red-orange"', '("agent",)': '("top",)'}
    names = run("docs/simulators.md", {}, stand_ins)
    assert names["obs"]["pixels"]["top"].shape == (224, 224, 3) and "metaworld" in names["list_suites"]()


def test_kernels() -> None:
    names = run("kernels/README.md", {
        "x": draw(5, 16), "w_enc": draw(2, 16, seed=1), "b_enc": torch.zeros(2), "threshold": torch.zeros(2),
        "w_dec": draw(2, 16, seed=2), "scale": torch.tensor([[0.0, 0.0]]), "shift": torch.tensor([[0.0, 4.0]]),
        "lo": torch.full((1, 2), -torch.inf), "hi": torch.full((1, 2), torch.inf),
    })  # fmt: skip
    assert names["y"].shape == (5, 16) and not torch.equal(names["y"], names["x"])


@pytest.mark.parametrize("page", PIECES)
def test_pieces_are_what_the_files_say(page: str) -> None:
    """Line by line, spaces aside; "..." leaves something out, and comments speak to the reader."""
    files = ["".join((ROOT / file).read_text().split()) for file in PIECES[page]]
    for block in python_blocks(page):
        for line in block.text.splitlines():
            parts = ["".join(part.split()) for part in line.split("#")[0].split("...")]
            wrong = [part for part in parts if not any(part in text for text in files)]
            assert not wrong, f"{block.where}: {line.strip()!r} stands in none of {PIECES[page]}"


def test_marks_of_what_a_block_needs_name_packages() -> None:
    known = {"metaworld", "gym_aloha", "gym_pusht", "libero", "ray", "lerobot", "triton"}
    for page in PAGES:
        for block in python_blocks(page):
            assert block.needs is None or block.needs in known, f"{block.where} needs {block.needs}"
            if page not in PIECES:
                ast.parse(block.text)
