"""Models are drawn as they were run: from the manifest's spec, within bounds, with the results that name a place."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hooked_vla import HookedVLA, get_spec
from hooked_vla.atlas import skeletons
from hooked_vla.atlas.routes import NotThere
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.skeletons import skeleton, spec_from_json
from hooked_vla.atlas.views import models
from hooked_vla.atlas.views.named_places import places_in
from hooked_vla.weights import shipped_policies

NAME = "smolvla-tabletop"


@pytest.fixture(scope="module")
def policy() -> HookedVLA:
    return HookedVLA.from_pretrained(NAME)


def spec_of(run: Run) -> dict[str, Any]:
    return copy.deepcopy(run.experiments["E4"].about["model"]["spec"])


def test_a_manifests_spec_is_that_of_the_policy(run: Run, policy: HookedVLA) -> None:
    spec = spec_from_json(spec_of(run))
    assert spec.geometry() == policy.spec.geometry() and spec.features == policy.spec.features
    built = skeleton(spec)
    assert built.hook_points == policy.hook_points
    assert all(parameter.is_meta for parameter in built.net.parameters())


@pytest.mark.parametrize("name", shipped_policies())
def test_the_packages_policies_are_known_without_their_weights(run: Run, name: str) -> None:
    found = models.model(run, name)
    assert found["name"] == name and found["parameters"] > 100_000
    sites = [site["name"] for box in found["boxes"] for site in box["sites"]]
    assert len(sites) == len(set(sites)) == sum(pathway["points"] for pathway in found["pathways"])


def test_boxes_are_blocks_with_what_reaches_the_action(run: Run, policy: HookedVLA) -> None:
    found = models.model(run, NAME)
    boxes = {box["name"]: box for box in found["boxes"]}
    ways = [box["name"] for box in found["boxes"] if box["pathway"] == "vlm"]
    assert ways == ["vlm.in", *(f"vlm.blocks.{i}" for i in range(4)), "vlm.out"]
    assert boxes["vlm.out"]["dead"] == "all" and boxes["vlm.blocks.3"]["dead"] == "some"
    assert boxes["vlm.blocks.2"]["dead"] == "none"
    assert [box["name"] for box in found["boxes"] if box["reads"]] == [f"expert.blocks.{i}" for i in range(4)]
    for box in found["boxes"]:
        for site in box["sites"]:
            known = policy.hook_points[site["name"]]
            assert site["reaches"] == known.reaches_action and site["shape"] == list(known.shape)
            assert site["meaning"] == known.meaning and site["repeated"] == known.denoised
    assert found["denoise_steps"] == policy.n_denoise_steps and found["source"] == "run"


def test_results_stand_with_the_places_that_they_name(run: Run) -> None:
    found = [each for each in models.results(run, NAME) if each["table"] == "results" and each["column"] == "arm"]
    places = {each["value"]: each["places"] for each in found}
    assert places["vlm:middle"] == ["vlm.blocks.2.hook_resid_post"]
    assert "expert" in places["expert"] and "baseline" not in places
    measured = {each["value"]: dict((name, value) for name, value, *_ in each["measured"]) for each in found}
    assert measured["expert"]["success"] == 0 and all(each["experiment"] == "E4" for each in found)
    assert models.results(run, "act-tabletop") == []


@pytest.mark.parametrize(("text", "places"), [
    ("zero vlm.blocks.1", ["vlm.blocks.1"]),
    ("language: vlm.blocks.0.hook_resid_pre", ["vlm.blocks.0.hook_resid_pre"]),
    ("expert L2H3", ["expert.blocks.2"]),
    ("noise: vlm:last", ["vlm.blocks.3.hook_resid_post"]),
    ("vlm.mlp_out:first", ["vlm.blocks.0.hook_mlp_out"]),
    ("expert", ["expert"]),
    ("expert L9", []), ("vlm.blocks.9", []), ("vlm:nowhere", []), ("baseline", []), ("put the red block", []), ("", []),
])  # fmt: skip
def test_texts_that_name_places(policy: HookedVLA, text: str, places: list[str]) -> None:
    assert places_in(text, policy) == places


def test_the_prefix_is_a_place(policy: HookedVLA) -> None:
    assert "expert.blocks.0.attn.hook_prefix_k" in places_in("prefix_kv", policy)


def test_specs_that_nothing_real_has_are_refused(run: Run) -> None:
    def changed(**changes: Any) -> dict[str, Any]:
        spec = spec_of(run)
        for path, value in changes.items():
            *parts, last = path.split("__")
            at = spec
            for part in parts:
                at = at[part]
            at[last] = value
        return spec

    for spec, text in (
        (changed(name="nothing"), "unknown model"),
        (changed(name=3), "a spec has a name"),
        (changed(vlm__n_layers=10**6), "too large"),
        (changed(vlm__d_model=10**9), "too large"),
        (changed(expert__schedule=["joint"] * 10**4), "at most 512"),
        (changed(vlm__colour=1), "no entries"),
    ):
        with pytest.raises(ValueError, match=text):
            spec_from_json(spec)
    # what a manifest leaves out is the library's own
    assert spec_from_json(changed(expert={"decoder": {}})).expert == get_spec("smolvla").expert


def test_a_model_that_cannot_be_built_says_so(run: Run, tmp_path: Path) -> None:
    about = json.loads((run.root / "E4" / "experiment.json").read_text())
    about["model"]["spec"]["vlm"]["n_layers"] = 10**9
    (tmp_path / "E4").mkdir()
    (tmp_path / "E4" / "experiment.json").write_text(json.dumps(about))
    made = Run.open(tmp_path, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"smolvla\.vlm\.n_layers is 1000000000"):
        models.model(made, NAME)
    with pytest.raises(NotThere):
        models.model(made, "../E4")


def test_parts_that_the_librarys_spec_leaves_out_are_made() -> None:
    base = get_spec("smolvla")
    with pytest.raises(ValueError, match="is incomplete"):
        skeletons._value(type(base.vlm) | None, None, {"d_model": 3}, "x")
    made = {field: getattr(base.vlm, field) for field in base.vlm.__dataclass_fields__}
    assert skeletons._value(type(base.vlm) | None, None, made, "x") == base.vlm
