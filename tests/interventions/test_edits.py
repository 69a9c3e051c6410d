"""Edits as data: one normal form, one line each, JSON there and back, and errors that name what is wrong."""

import json
import math
import re
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from unchecked import unchecked_shapes

from hooked_vla.interventions import (
    Ablate,
    Add,
    AddRelative,
    Clamp,
    Edit,
    Overwrite,
    Patch,
    ProjectOut,
    SAEFeatureEdit,
    SAEReconstruct,
    Scale,
    SubspacePatch,
    Window,
    describe_edits,
    load_edits,
    per_row,
    read_edits,
    save_edits,
)
from hooked_vla.interventions.files import EDITS
from hooked_vla.sae.splice import SpliceSAE

SITE = "vlm.blocks.1.hook_resid_post"


def make_sae(m: int = 8, d: int = 4, k: int | None = None, seed: int = 0) -> SpliceSAE:
    generator = torch.Generator().manual_seed(seed)
    w_enc, w_dec = torch.randn(2, m, d, generator=generator) * d**-0.5
    b_enc, threshold = torch.randn(2, m, generator=generator).abs()
    return SpliceSAE(w_enc, -b_enc, w_dec, torch.randn(d, generator=generator), None if k else threshold, k)


def every_edit() -> list[Edit]:
    large = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    return [
        Patch(SITE, large.bfloat16(), strength=0.5, tokens=["language", "image:*"], denoise=[3, 1], name="patch"),
        Patch(SITE, torch.ones(2, 3, 4)),
        Add(["a.*", "b"], [1.0, 2.0], -3, env=[range(5), 7, Window(9)], rows=[2, 0]),
        AddRelative(SITE, large[0], 0.25, positions=range(3, 5)),
        Scale("x", 2, heads=1, channels=[0, 3]),
        Clamp("x", low=-1.5),
        Clamp("x", high=math.inf, keys="language"),
        Ablate("x", "zero"),
        Ablate("x", "resample", large, seed=3),
        ProjectOut("x", large, center=large[0]),
        SubspacePatch("x", large, large, 0.5),
        Overwrite("x", -math.inf, tokens="action", keys="language"),
        Overwrite("x", [1.0, 2.0], channels=[4, 2]),
        SAEReconstruct("x", make_sae(), pool="segment"),
        SAEFeatureEdit("x", make_sae(k=2), [3, 1], scale=[0.0, 2.0], shift=1.5, low=[None, -1.0], keep_error=False),
    ]


def test_every_kind_is_tried_here() -> None:
    assert {edit.kind for edit in every_edit()} == set(EDITS)


def test_json_round_trip(tmp_path) -> None:
    edits = every_edit()
    save_edits(edits, tmp_path / "folder" / "edits.json")
    assert load_edits(tmp_path / "folder" / "edits.json") == edits
    # what two edits share is kept once
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert len(names) == 4 and names[-1] == "edits.safetensors"
    assert load_edits(tmp_path / "folder" / "edits.json")[0].source.tensor.dtype == torch.bfloat16


def test_saved_edits_move_with_their_files_and_refer_to_a_saved_autoencoder(tmp_path) -> None:
    (tmp_path / "here" / "saes").mkdir(parents=True)
    sae = make_sae().save(tmp_path / "here" / "saes" / "one.safetensors")
    save_edits([SAEFeatureEdit("x", sae, 1, scale=0)], tmp_path / "here" / "edits.json")
    assert len(list((tmp_path / "here").iterdir())) == 2
    (tmp_path / "here").rename(tmp_path / "there")
    [edit] = load_edits(tmp_path / "there" / "edits.json")
    assert edit.sae == sae and edit.sae.file == tmp_path / "there" / "saes" / "one.safetensors"


def test_description_is_plain_json_and_tells_tensors_apart() -> None:
    edits = every_edit()
    described = json.loads(json.dumps(describe_edits(edits), allow_nan=False))
    changed = replace(edits[0], source=edits[0].source.tensor + 1)
    assert described == describe_edits(edits) != describe_edits([changed, *edits[1:]])
    with pytest.raises(ValueError, match=re.escape("edit 0 (Patch), source: a tensor's reference needs ['file', 'ten")):
        read_edits(described)


def corrupt(data: dict, path: str, value: object) -> dict:
    *folders, last = path.split(".")
    place = data
    for each in folders:
        place = place[int(each) if each.isdigit() else each]
    place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "other", "format 'other', expected 'hooked-vla edits'"),
        ("version", 2, "version 2; this version of the library reads 1"),
        ("extra", 1, "unknown key 'extra'"),
        ("edits", {}, "edits must be a list"),
        ("edits.0.edit", "Ad", "edit 0: unknown edit 'Ad'; edits: Patch, Add,"),
        ("edits.0.strenght", 1.0, r"edit 0 \(Add\): unknown key 'strenght' \(did you mean 'strength'\?\)"),
        ("edits.0.strength", "much", r"edit 0 \(Add\): strength must be a number, got 'much'"),
        ("edits.0.direction.sha256", "0", r"edit 0 \(Add\), direction: .* holds another tensor"),
        ("edits.0.direction.tensor", "no", r"has no tensor 'no'; it has \["),
        ("edits.0.direction.file", "no.safetensors", "no.safetensors does not exist"),
        ("edits.0.direction.files", "no", r"unknown keys \['files'\] in a tensor's reference"),
        ("edits.0.env", [[3]], r"env must be a list of pairs"),
        ("edits.1.sae.sha256", "0", r"edit 1 \(SAEReconstruct\), sae: .* is another autoencoder"),
    ],
)
@unchecked_shapes()
def test_damaged_json_is_refused_by_name(tmp_path, path: str, value: object, message: str) -> None:
    save_edits([Add(SITE, torch.ones(100), 2.0), SAEReconstruct(SITE, make_sae())], tmp_path / "e.json")
    data = json.loads((tmp_path / "e.json").read_text())
    (tmp_path / "e.json").write_text(json.dumps(corrupt(data, path, value)))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_edits(tmp_path / "e.json")


def test_missing_keys_and_truncated_files_are_refused(tmp_path) -> None:
    document = {"format": "hooked-vla edits", "version": 1, "edits": [{"edit": "Add", "site": "x"}]}
    with pytest.raises(ValueError, match=r"edit 0 \(Add\): missing direction, strength"):
        read_edits(document)
    save_edits([Add(SITE, torch.ones(100), 2.0), SAEReconstruct(SITE, make_sae())], tmp_path / "e.json")
    for file in tmp_path.glob("*.safetensors"):
        whole = file.read_bytes()
        file.write_bytes(whole[:-5])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            load_edits(tmp_path / "e.json")
        file.write_bytes(whole)
    (tmp_path / "e.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_edits(tmp_path / "e.json")


def test_each_prints_one_clear_line() -> None:
    assert [str(edit) for edit in every_edit()[:5]] == [
        f"patch: Patch source[3 100] × 0.5 at {SITE}, tokens language,image:*, denoise steps 1,3",
        f"Patch source[2 3 4] at {SITE}",
        "Add -3 × direction[2] at a.* + b, env steps 0–4,7,9–, rows 0,2",
        f"AddRelative 0.25 × ‖x‖ × direction[100] at {SITE}, positions 3,4",
        "Scale x × 2 at x, heads 1, channels 0,3",
    ]
    assert all("\n" not in str(edit) for edit in every_edit())


def test_one_normal_form() -> None:
    assert Scale("x", 1, tokens="a", denoise=2, env=range(3), rows=1) == Scale(
        ["x"], 1.0, tokens=["a", "a"], denoise=[2, 2], env=[2, 0, Window(1, 2)], rows=(1,)
    )
    assert Scale("x", 1, env=range(0, 6, 2)).env == (Window(0, 1), Window(2, 3), Window(4, 5))
    edit = Add("x", [1.0, 2.0], 1)
    assert hash(edit) == hash(Add("x", torch.tensor([1.0, 2.0]), 1.0)) and edit != Add("x", [1.0, 3.0], 1)
    with pytest.raises(FrozenInstanceError):
        edit.strength = 2.0


def test_an_edit_keeps_its_own_copy() -> None:
    direction = torch.ones(4)
    edit = Add("x", direction, 1.0)
    direction += 1
    assert torch.equal(edit.direction.tensor, torch.ones(4))


def test_edits_of_rows() -> None:
    first, second = Scale("x", 2.0), Scale("y", 3.0)
    assert per_row([[first], [], [first, second]]) == [
        replace(first, rows=0), replace(first, rows=2), replace(second, rows=2),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="row 0 has an edit for rows of its own choice: Scale x × 2 at x, rows 1"):
        per_row([[replace(first, rows=1)]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scale((), 1.0), "site is empty"),
        (lambda: Scale("x", float("nan")), "factor must be a number, got nan"),
        (lambda: Scale("x", math.inf), "factor must be finite"),
        (lambda: Scale("x", 1.0, tokens=[]), "tokens is empty, so that nothing is edited"),
        (lambda: Scale("x", 1.0, rows=[-1]), "rows are counted from 0, got -1"),
        (lambda: Scale("x", 1.0, env=range(3, 3)), "no environment steps from 3 to before 3"),
        (lambda: Scale("x", 1.0, env=[]), "env is empty"),
        (lambda: Add("x", [1.0, float("nan")], 1.0), "direction must hold finite numbers, got NaN"),
        (lambda: Add("x", [], 1.0), "direction is empty"),
        (lambda: AddRelative("x", [0.0, 0.0], 1.0), "direction must not be zero"),
        (lambda: Clamp("x"), "Clamp needs low, high or both"),
        (lambda: Clamp("x", 2.0, 1.0), "low must be at most high, got 2 and 1"),
        (lambda: Ablate("x", "null"), "ablation must be one of zero, mean, resample, got 'null'"),
        (lambda: Ablate("x", "mean"), "'mean' needs a source"),
        (lambda: Ablate("x", "zero", [1.0]), "'zero' takes no source"),
        (lambda: SAEReconstruct("x", make_sae(), pool="mean"), "pool must be one of token, segment"),
        (lambda: SAEFeatureEdit("x", make_sae(), [8]), r"features \[8\]: the SAE has features 0..7"),
        (lambda: SAEFeatureEdit("x", make_sae(), [1, 1]), r"features come more than once: \[1\]"),
        (lambda: SAEFeatureEdit("x", make_sae(), [1, 2], scale=[1.0]), "scale has 1 numbers for 2 features"),
        (lambda: SAEFeatureEdit("x", make_sae(), 1, low=2.0, high=1.0), "low must be at most high, got 2 and 1 for fe"),
        (lambda: SAEFeatureEdit("x", make_sae(), 1, shift=math.inf), "shift must be finite"),
        (lambda: SAEFeatureEdit("x", make_sae(), 1, low=math.inf), "must leave a finite number, got inf twice"),
        (lambda: SAEFeatureEdit("x", make_sae(), [1, 2], high=[1.0, -math.inf]), "got -inf twice for feature 2"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@unchecked_shapes()
def test_numbers_come_from_tensors_and_arrays_too() -> None:
    """As they leave topk, argmax and NumPy."""
    sae = make_sae()
    plain = SAEFeatureEdit("x", sae, [3, 1], scale=[0.5, 2.0], shift=1.5)
    for given in (torch.tensor([3, 1]), np.array([3, 1]), torch.tensor([[3, 1]]), [np.int64(3), torch.tensor(1)]):
        assert SAEFeatureEdit("x", sae, given, scale=[0.5, 2.0], shift=1.5) == plain
    for kind in (torch.tensor, np.array):
        assert SAEFeatureEdit("x", sae, [3, 1], scale=kind([0.5, 2.0]), shift=kind(1.5)) == plain
    for one in (torch.tensor(3), np.uint8(3), np.array(3)):
        assert SAEFeatureEdit("x", sae, one) == SAEFeatureEdit("x", sae, 3)
    for number in (np.float32(2), np.float64(2), np.int64(2), torch.tensor(2.0), np.array(2.0)):
        assert Add("x", [1.0], number) == Add("x", [1.0], 2) and Overwrite("x", number) == Overwrite("x", 2)
    by_array = Scale("x", 1.0, rows=torch.tensor([2, 0]), positions=np.arange(3))
    assert by_array == Scale("x", 1.0, rows=[0, 2], positions=range(3))
    json.dumps(describe_edits([plain, Add("x", [1.0], np.float32(2))]))
    for bad in (True, torch.tensor([1.0, 2.0]), "2", np.bool_(True), None, 2j):
        with pytest.raises(ValueError, match="strength must be a number, got"):
            Add("x", [1.0], bad)
    for bad in (torch.tensor([1.0]), np.array([True]), [1.5], "3", torch.tensor(True), [torch.tensor(1.5)]):
        with pytest.raises(TypeError, match="features must be a whole number or several, got"):
            SAEFeatureEdit("x", sae, bad)
    for bad in ({}, object()):
        with pytest.raises((TypeError, ValueError), match="scale"):
            SAEFeatureEdit("x", sae, 1, scale=bad)


def test_an_autoencoder_in_another_dtype() -> None:
    sae = make_sae()
    narrow = sae.to(torch.bfloat16)
    assert {name: each.dtype for name, each in narrow.tensors().items()} == {
        "w_enc": torch.bfloat16, "w_dec": torch.bfloat16, "b_enc": torch.float32, "b_dec": torch.float32,
        "threshold": torch.float32,
    }  # fmt: skip
    assert torch.equal(narrow.w_enc, sae.w_enc.bfloat16()) and narrow != sae and sae.to(torch.float32) == sae
    with pytest.raises(TypeError, match=r"SAE: dtype must be a floating-point one, got torch.int8"):
        sae.to(torch.int8)


@unchecked_shapes()
def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="rows must be a whole number or several, got 1.5"):
        Scale("x", 1.0, rows=1.5)
    with pytest.raises(TypeError, match="env must be environment steps, ranges or Windows, got '3'"):
        Scale("x", 1.0, env=["3"])
    with pytest.raises(TypeError, match="direction must be a tensor, or lists of numbers"):
        Add("x", ["a"], 1.0)
    with pytest.raises(TypeError, match="direction must be of a floating-point dtype, got torch.int64"):
        Add("x", torch.arange(3), 1.0)


@unchecked_shapes()
def test_autoencoders_that_do_not_fit_together_are_refused(tmp_path) -> None:
    w, b, d = torch.ones(3, 2), torch.ones(3), torch.ones(2)
    with pytest.raises(ValueError, match=r"b_enc must be \[3\] beside w_enc \[3 2\], got \[2\]"):
        SpliceSAE(w, d, w, d, k=1)
    for both in ({}, {"k": 1, "threshold": b}):
        with pytest.raises(ValueError, match="exactly one of threshold"):
            SpliceSAE(w, b, w, d, **both)
    with pytest.raises(ValueError, match=r"k must be in 1..3"):
        SpliceSAE(w, b, w, d, k=4)
    with pytest.raises(ValueError, match="w_dec holds NaN or infinity"):
        SpliceSAE(w, b, w * torch.nan, d, k=1)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        SpliceSAE.load(tmp_path / "no.safetensors")


def test_a_folded_normalisation_is_the_same_autoencoder() -> None:
    sae = make_sae(16, 6)
    mean, std = torch.randn(6), torch.rand(6) + 0.5
    x = torch.randn(9, 6).double()

    def reconstruct(sae: SpliceSAE, x: torch.Tensor) -> torch.Tensor:
        w_enc, b_enc, w_dec, b_dec, threshold = (each.double() for each in sae.tensors().values())
        z = (x - b_dec) @ w_enc.T + b_enc
        return torch.where(z > threshold, z, 0) @ w_dec + b_dec

    expected = reconstruct(sae, (x - mean) / std) * std + mean
    torch.testing.assert_close(reconstruct(sae.normalised_by(mean, std), x), expected, rtol=1e-5, atol=1e-5)
