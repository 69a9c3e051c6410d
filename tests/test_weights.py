"""Loading and saving checkpoints: what is used, what is refused, and that nothing is held twice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from public_checkpoints import GOLDEN, Golden
from safetensors.torch import load_file, save_file

from hooked_vla import HookedVLA, list_models, registry
from hooked_vla.spec import Split, Transposed
from hooked_vla.weights import KeyRules, Source, plan_loading


@pytest.fixture
def folder(golden: Golden, tmp_path: Path) -> Path:
    """A copy of the recorded checkpoint that a test may damage."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(golden.folder, copy)
    return copy


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def public_keys(name: str) -> dict[str, tuple[int, ...]]:
    lines = (GOLDEN / "keys" / f"{name}.txt").read_text().split("\n")
    rows = [line.split() for line in lines if line.strip()]
    return {row[0]: tuple(int(size) for size in row[1].split("x")) if len(row) > 1 else () for row in rows}


def test_rules_consume_each_published_smolvla_key_exactly_once() -> None:
    spec = registry.get_spec("smolvla")
    with torch.device("meta"):
        parameters = {name: p.shape for name, p in registry.build_network(spec).state_dict().items()}
    plan, dropped = plan_loading(KeyRules(spec.keys), public_keys("smolvla"), parameters)
    assert dropped == []
    assert len({source.key for source in plan.values()}) == len(plan) == 500


@pytest.mark.parametrize("name", list_models())
def test_save_and_load_round_trip_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = HookedVLA.from_spec(name, size="tiny", seed=3)
    model.save_pretrained(tmp_path)
    again = HookedVLA.from_pretrained(tmp_path)
    assert again.spec.geometry() == model.spec.geometry()
    ours, theirs = model.net.state_dict(), again.net.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_public_checkpoint_round_trips(golden: Golden, golden_model: HookedVLA, tmp_path: Path) -> None:
    golden_model.save_pretrained(tmp_path)
    before, after = (load_file(each / "model.safetensors") for each in (golden.folder, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "vlm" / "config.json").is_file() and (tmp_path / "geometry.json").is_file()
    shutil.rmtree(tmp_path / "vlm")
    again = HookedVLA.from_pretrained(tmp_path)
    assert torch.equal(
        again.predict_action_chunk(golden.batch, golden.noise),
        golden_model.predict_action_chunk(golden.batch, golden.noise),
    )


def test_sharded_files_load(golden: Golden, golden_model: HookedVLA, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = HookedVLA.from_pretrained(folder)
    assert torch.equal(model.predict_action_chunk(golden.batch, golden.noise),
                       golden_model.predict_action_chunk(golden.batch, golden.noise))  # fmt: skip
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        HookedVLA.from_pretrained(folder)


def test_saving_over_another_checkpoint_leaves_nothing_of_it(golden_model: HookedVLA, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"part{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "policy_preprocessor.json").write_text(json.dumps({"steps": []}))
    golden_model.save_pretrained(folder)
    assert not {"part0.safetensors", "model.safetensors.index.json", "policy_preprocessor.json"} & {
        path.name for path in folder.iterdir()
    }
    HookedVLA.from_pretrained(folder)


def test_the_index_decides_which_file_holds_a_key(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    bias = "model.action_out_proj.bias"
    weight_map = {key: "model.safetensors" for key in tensors} | {bias: "a.safetensors"}
    save_file({bias: torch.full((10,), 7.0)}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert (HookedVLA.from_pretrained(folder).net.expert.action_out_proj.bias == 7).all()
    weight_map["model.action_in_proj.bias"] = "a.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"says that a.safetensors holds \['model.action_in_proj.bias'\]"):
        HookedVLA.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        HookedVLA.from_pretrained(folder)


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_steps", -1), ("num_steps", 0), ("num_steps", "10"), ("chunk_size", 0), ("min_period", 0.0),
     ("resize_imgs_with_padding", [64]), ("n_action_steps", 99), ("rtc_config", {"enabled": True})],
)  # fmt: skip
def test_options_out_of_range_are_named(option: str, value: object, folder: Path) -> None:
    edit_config(folder, **{option: value})
    with pytest.raises(ValueError, match=option):
        HookedVLA.from_pretrained(folder)


def test_keys_of_a_compiled_model_load(golden: Golden, folder: Path) -> None:
    def wrap(tensors: dict) -> None:
        for key in list(tensors):
            tensors[key.replace("model.", "model._orig_mod.", 1)] = tensors.pop(key)

    rewrite(folder, wrap)
    actions = HookedVLA.from_pretrained(folder).predict_action_chunk(golden.batch, golden.noise)
    torch.testing.assert_close(actions, golden.actions, rtol=1e-5, atol=1e-5)


def test_missing_extra_and_misshapen_keys_are_named(folder: Path) -> None:
    def damage(tensors: dict) -> None:
        tensors["model.extra.weight"] = torch.zeros(3)
        del tensors["model.vlm_with_expert.lm_expert.norm.weight"]
        tensors["model.action_in_proj.bias"] = torch.zeros(7)

    rewrite(folder, damage)
    with pytest.raises(ValueError, match="3 problems") as error:
        HookedVLA.from_pretrained(folder)
    assert "unexpected key model.extra.weight" in str(error.value)
    assert "missing key model.vlm_with_expert.lm_expert.norm.weight for expert.ln_final.weight" in str(error.value)
    assert "model.action_in_proj.bias has shape [7], but expert.action_in_proj.bias needs [48]" in str(error.value)


def test_damaged_files_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (whole[:-1000], whole[:4], b""):
        weights.write_bytes(cut)
        with pytest.raises(ValueError, match=r"model.safetensors is truncated or not a safetensors file"):
            HookedVLA.from_pretrained(folder)
    weights.write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        HookedVLA.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        HookedVLA.from_pretrained(folder)


def test_other_architectures_and_options_are_refused(folder: Path) -> None:
    edit_config(folder, type="tdmpc")
    with pytest.raises(ValueError, match=r"type 'tdmpc'; known families of checkpoints: .*smolvla"):
        HookedVLA.from_pretrained(folder)
    edit_config(folder, type="smolvla", adapt_to_pi_aloha=True)
    with pytest.raises(ValueError, match="adapt_to_pi_aloha=True, which is not supported"):
        HookedVLA.from_pretrained(folder)
    edit_config(folder, adapt_to_pi_aloha=False, num_expert_layers=2)
    with pytest.raises(ValueError, match="num_expert_layers=2"):
        HookedVLA.from_pretrained(folder)
    edit_config(folder, num_expert_layers=-1, add_image_special_tokens=True)
    with pytest.raises(ValueError, match="add_image_special_tokens: put tokenizer.json"):
        HookedVLA.from_pretrained(folder)


def test_head_width_that_does_not_fit_asks_for_geometry(folder: Path) -> None:
    (folder / "vlm" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"head width 64|divide into 0 heads.*geometry.json"):
        HookedVLA.from_pretrained(folder)
    (folder / "geometry.json").write_text(json.dumps({"vision": {"n_heads": 3}, "vlm": {"d_head": 16}}))
    HookedVLA.from_pretrained(folder)


@pytest.mark.parametrize("device", ["warp:0", "cuda:77"])
def test_unknown_devices_are_named(device: str, golden: Golden) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' is unknown or not available"):
        HookedVLA.from_pretrained(golden.folder, device=device)


def test_a_checkpoint_that_is_nowhere() -> None:
    with pytest.raises(FileNotFoundError, match="'no such folder' is neither a folder nor a checkpoint"):
        HookedVLA.from_pretrained("no such folder")
    with pytest.raises(ValueError, match="unknown model 'gpt'; known models: .*smolvla"):
        HookedVLA.from_spec("gpt")
    with pytest.raises(ValueError, match="unknown size 'huge'"):
        HookedVLA.from_spec("smolvla", size="huge")


def test_device_maps_and_offloading(golden: Golden, golden_model: HookedVLA, tmp_path: Path) -> None:
    expected = golden_model.predict_action_chunk(golden.batch, golden.noise)
    for device_map in ("auto", {"": "cpu"}):
        model = HookedVLA.from_pretrained(golden.folder, device_map=device_map)
        assert torch.equal(model.predict_action_chunk(golden.batch, golden.noise), expected)
    on_disk = {"vision": "disk", "connector": "cpu", "vlm": "disk", "expert": "cpu", "head": "cpu"}
    model = HookedVLA.from_pretrained(golden.folder, device_map=on_disk, offload_dir=tmp_path)
    assert model.net.vision.patch_embed.weight.is_meta
    assert torch.equal(model.predict_action_chunk(golden.batch, golden.noise), expected)
    _, cache = model.run_with_cache(golden.batch, "vlm.blocks.*.hook_resid_post", noise=golden.noise)
    assert len(cache) == 4
    with pytest.raises(ValueError, match=r"weights of \['vision', 'vlm'\] are not in memory"):
        model.save_pretrained(tmp_path / "copy")
    with pytest.raises(ValueError, match='must be "auto" or a mapping'):
        HookedVLA.from_pretrained(golden.folder, device_map="balanced")
    with pytest.raises(ValueError, match=r"device_map says nothing about"):
        HookedVLA.from_pretrained(golden.folder, device_map={"vision": "cpu"})


def test_loading_holds_one_copy(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before weights are read the network is on the meta device; each tensor is read once."""
    from hooked_vla import vla
    from hooked_vla.weights import Checkpoint

    reads, fill, read = [], vla.fill_network, Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, key: reads.append(key) or read(self, key))

    def fill_an_empty_network(net, plan, *rest) -> None:
        assert all(parameter.is_meta for parameter in net.parameters())
        fill(net, plan, *rest)

    monkeypatch.setattr(vla, "fill_network", fill_an_empty_network)
    model = HookedVLA.from_pretrained(golden.folder)
    assert len(reads) == len(set(reads)) == len(list(model.net.parameters()))
    assert model.load_report is not None and len(model.load_report.loaded) == len(reads)


def test_rules_split_transpose_drop_and_alternate() -> None:
    rules = KeyRules(
        {
            "model.|": {
                "layers.{}.qkv": Split(("b.{}.q", "b.{}.k", "b.{}.v")),
                "layers.{}.w": ("b.{}.first", "b.{}.second"),
                "head": Transposed("head"),
                "old": None,
            }
        }
    )
    parameters = {"b.3.q": (2, 5), "b.3.k": (2, 5), "b.3.v": (2, 5), "b.3.second": (4,), "head": (7, 3), "tied": (1,)}
    shapes = {"model.layers.3.qkv": (6, 5), "layers.3.w": (4,), "model.head": (3, 7), "old": (9,)}
    plan, dropped = plan_loading(rules, shapes, parameters, tied=("tied",))
    assert dropped == ["old"]
    assert plan["b.3.k"] == Source("model.layers.3.qkv", part=1, n_parts=3)
    assert plan["b.3.second"] == Source("layers.3.w")
    whole = torch.arange(30.0).view(6, 5)
    assert torch.equal(plan["b.3.k"].take(whole), whole[2:4])
    assert plan["head"].take(torch.zeros(3, 7)).shape == (7, 3)
    assert rules.public_sources(["b.3.v"]) == {"b.3.v": Source("model.layers.3.qkv", part=2, n_parts=3)}
    with pytest.raises(ValueError, match="2 key rules claim 'a.b'"):
        KeyRules({"a.": {"b": "x"}, "": {"a.b": "y"}}).find("a.b", {"x", "y"})
    with pytest.raises(ValueError, match=r"missing key \? for tied"):
        plan_loading(rules, shapes, parameters)
