"""GR00T N1.5 and N1.7 against the public implementations' recorded values, and what their wiring implies."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from public_checkpoints import GOLDEN, Golden, read_golden
from safetensors.torch import load_file, save_file
from tolerance import assert_close
from torch import Tensor

from hooked_vla import HookedVLA, Observation, registry
from hooked_vla.models.groot import grid_positions
from hooked_vla.spec import FeatureVLASpec
from hooked_vla.weights import KeyRules, plan_loading

NAMES = ["groot_n15", "groot_n17"]
# what a batch calls token ids, their mask and pixels
KEYS = {
    "groot_n15": ("eagle_input_ids", "eagle_attention_mask", "eagle_pixel_values"),
    "groot_n17": ("input_ids", "attention_mask", "pixel_values"),
}
_LEAVES = {
    "q_proj": "attn.hook_q", "k_proj": "attn.hook_k", "v_proj": "attn.hook_v", "o_proj": "hook_attn_out",
    "out_proj": "hook_attn_out", "down_proj": "hook_mlp_out", "fc2": "hook_mlp_out", "layers": "hook_resid_post",
    "proj": "hook_attn_out", "linear_fc2": "hook_mlp_out", "0": "hook_attn_out", "2": "hook_mlp_out",
}  # fmt: skip
_WHOLE = {
    "action_head.action_decoder": "expert.hook_velocity",
    "action_head.action_decoder.layer2": "expert.hook_velocity",
    "action_head.model.proj_out_2": "expert.hook_out",
    "action_head.state_encoder.layer2": "expert.hook_embed_state",
    "action_head.vlln": "adapter.ln_pre.hook_normalized",
    "backbone.eagle_model.mlp1.0": "connector.hook_out",
    "backbone.eagle_model.vision_model.vision_model.post_layernorm": "vision.ln_final.hook_normalized",
    "backbone.model.model.visual.merger.linear_fc2": "connector.hook_out",
    "backbone.model.model.visual.deepstack_merger_list.0.linear_fc2": "connector.deepstack.0.hook_out",
    "backbone.model.model.visual.deepstack_merger_list.1.linear_fc2": "connector.deepstack.1.hook_out",
}
_STACKS = {
    "action_head.model.transformer_blocks": "expert", "action_head.vl_self_attention.transformer_blocks": "adapter",
    "backbone.eagle_model.vision_model.vision_model.encoder.layers": "vision",
    "backbone.eagle_model.language_model.model.layers": "vlm", "backbone.model.model.language_model.layers": "vlm",
    "backbone.model.model.visual.blocks": "vision",
}  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def golden(name: str) -> Golden:
    return read_golden(name)


@pytest.fixture(scope="module")
def model(golden: Golden) -> HookedVLA:
    return HookedVLA.from_pretrained(golden.folder).requires_grad_(False)


@pytest.fixture(scope="module")
def tiny(name: str) -> HookedVLA:
    return HookedVLA.from_spec(name, size="tiny", seed=0).requires_grad_(False)


def observation(seed: int = 0, texts: tuple[str, ...] = ("Put the red block on the tray!", "lift")) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    images = {
        camera: torch.randint(0, 256, (len(texts), 48, 80, 3), generator=generator, dtype=torch.uint8)
        for camera in ("agent", "wrist")
    }
    return Observation(images, torch.randn(len(texts), 4, generator=generator), list(texts))


NOISE = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))


def hook_of(module: str) -> str:
    """The hook point that holds what a module of the public implementation returns."""
    if module in _WHOLE:
        return _WHOLE[module]
    match = re.fullmatch(r"(.*\.(?:layers|blocks|transformer_blocks))\.(\d+)(.*)", module)
    assert match is not None, module
    leaf = match.group(3).rpartition(".")[2] or "layers"
    return f"{_STACKS[match.group(1)]}.blocks.{match.group(2)}.{_LEAVES[leaf]}"


def as_recorded(value: Tensor, recorded: Tensor, hook: str) -> tuple[Tensor, Tensor]:
    """Both in the recording's layout: a call a denoise step, heads merged, patches of all images in one row."""
    if "attn.hook_" in hook:
        value = value.flatten(-2)
    if hook == "expert.hook_velocity":
        recorded = recorded[:, :, -value.shape[-2] :]
    if hook == "expert.hook_embed_state" or not hook.startswith("expert"):
        value = value[:1] if hook.startswith("expert") else value[None]
    if recorded.ndim == 3:
        value = value.flatten(1, 2)
    # large recordings keep the first calls and rows only
    return value[: recorded.shape[0], : recorded.shape[1]], recorded


def test_actions_equal_the_public_implementation(golden: Golden, model: HookedVLA) -> None:
    assert_close(model.predict_action_chunk(golden.batch, noise=golden.noise), golden.actions)


def test_every_recorded_module_agrees_with_its_hook_point(golden: Golden, model: HookedVLA) -> None:
    """All positions are compared: the features of padding reach the actions, so they are recomputed too."""
    _, cache = model.run_with_cache(golden.batch, noise=golden.noise)
    modules = {key.removeprefix("ref."): value for key, value in golden.recorded.items() if key.startswith("ref.")}
    head = next(key for key in modules if key.endswith("lm_head"))
    pool = "backbone.eagle_model.vision_model.vision_model.head.mlp.fc2"
    assert len(modules) > 40
    for module, recorded in modules.items():
        if module in (head, pool):
            continue
        hook = hook_of(module)
        ours, recorded = as_recorded(cache[hook], recorded, hook)
        assert ours.shape == recorded.shape, (module, hook, ours.shape)
        torch.testing.assert_close(ours, recorded, rtol=1e-5, atol=1e-5, msg=lambda text, m=module: f"{m}: {text}")
    logits = model.net.vlm.unembed(cache["vlm.ln_final.hook_normalized"])
    assert_close(logits[None, : modules[head].shape[1]], modules[head])
    if pool in modules:
        seen = []
        handle = model.net.vision.pool.down_proj.register_forward_hook(lambda *args: seen.append(args[2]))
        pooled = model.net.vision.pool(cache["vision.ln_final.hook_normalized"])
        handle.remove()
        assert pooled.shape == (2, model.net.vision.d_model)
        assert_close(seen[0][None], modules[pool])


def test_bfloat16_stays_within_the_table(golden: Golden) -> None:
    model = HookedVLA.from_pretrained(golden.folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.net.parameters()} == {torch.bfloat16}
    actions = model.predict_action_chunk(golden.batch, noise=golden.noise)
    assert actions.dtype == torch.float32
    assert_close(actions, golden.actions, torch.bfloat16)


def test_published_size_has_the_published_parameters_and_keys(name: str) -> None:
    spec = registry.get_spec(name)
    with torch.device("meta"):
        net = registry.build_network(spec)
    totals = {"groot_n15": 2_413_522_880, "groot_n17": 3_144_016_000}
    assert sum(parameter.numel() for parameter in net.parameters()) == spec.n_parameters == totals[name]
    lines = (GOLDEN / "keys" / f"{name}.txt").read_text().splitlines()
    shapes = {line.split()[0]: tuple(int(n) for n in line.split()[1].split("x")) for line in lines}
    parameters = {key: value.shape for key, value in net.state_dict().items()}
    plan, dropped = plan_loading(KeyRules(spec.keys), shapes, parameters)
    assert not dropped
    assert plan.keys() == parameters.keys()
    assert {source.key for source in plan.values()} == shapes.keys()


def copy(folder: Path, to: Path, **changes: object) -> Path:
    """A checkpoint's folder with changes to config.json; a dotted name reaches into it."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_saved_checkpoints_load_bit_for_bit(golden: Golden, model: HookedVLA, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = HookedVLA.from_pretrained(tmp_path)
    assert again.spec == model.spec
    stored, original = load_file(tmp_path / "model.safetensors"), load_file(golden.folder / "model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[key], original[key]) for key in stored)


def test_made_checkpoints_load_as_they_were(tiny: HookedVLA, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    again = HookedVLA.from_pretrained(tmp_path)
    assert again.spec == replace(tiny.spec, features=again.spec.features)
    assert again.spec.features == tiny.spec.features
    assert torch.equal(
        again.predict_action_chunk(observation(), NOISE), tiny.predict_action_chunk(observation(), NOISE)
    )


def test_lerobot_layout_loads(name: str, golden: Golden, tmp_path: Path) -> None:
    """LeRobot prefixes the keys and has a config.json of its own; sizes that it leaves out are in geometry.json."""
    copy(golden.folder, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    tied = next(key for key in weights if key.endswith("lm_head.weight"))
    renamed = {f"_groot_model.{key}": value for key, value in weights.items() if key != tied}
    save_file(renamed, tmp_path / "model.safetensors")
    # heads keep their published widths in a config.json that does not state them
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "type": "groot",
        "input_features": {
            "observation.images.top": {"type": "VISUAL", "shape": [3, 48, 80]},
            "observation.state": {"type": "STATE", "shape": [5]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [3]}},
        "n_action_steps": 50,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = HookedVLA.from_pretrained(tmp_path)
    assert model.spec.name == name
    assert model.net.vlm.unembed.weight is model.net.vlm.embed.weight
    features = model.spec.features
    assert (features.cameras, features.d_state, features.d_action, features.n_action_steps) == (("top",), 5, 3, 6)
    assert_close(model.predict_action_chunk(golden.batch, noise=golden.noise), golden.actions[..., :3])


OPTIONS = [
    ("groot_n15", {"action_head_cfg__diffusion_model_cfg__positional_embeddings": "sinusoidal"}),
    ("groot_n15", {"action_head_cfg__diffusion_model_cfg__norm_type": "layer_norm"}),
    ("groot_n15", {"action_head_cfg__vl_self_attention_cfg__attention_bias": False}),
    ("groot_n15", {"action_head_cfg__diffusion_model_cfg__num_attention_heads": 5}),
    ("groot_n15", {"backbone_cfg__project_to_dim": 32}),
    ("groot_n15", {"backbone_cfg__select_layer": 2}),
    ("groot_n15", {"action_head_cfg__action_horizon": 65}),
    ("groot_n17", {"diffusion_model_cfg__interleave_self_attention": False}),
    ("groot_n17", {"use_vlln": False}),
    ("groot_n17", {"state_history_length": 5}),
    ("groot_n17", {"exclude_state": True}),
    ("groot_n17", {"diffusion_model_cfg__activation_fn": "geglu"}),
]


@pytest.mark.parametrize(("name", "changes"), OPTIONS, ids=lambda each: str(each))
def test_what_is_not_supported_is_refused(name: str, changes: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(changes)).split("__")[-1] + "|heads|layers|states"):
        HookedVLA.from_pretrained(copy(GOLDEN / name, tmp_path, **changes))


@pytest.mark.parametrize("changes", [
    {"flow": {"n_steps": 3, "n_future": 0, "n_positions": 0, "n_embodiments": 2, "embodiment": 0}},
    {"adapter": None},
    {"adapter": {"n_layers": 0, "n_heads": 0, "d_head": 0, "d_mlp": 0}},
    {"expert": {"schedule": ("cross",) * 3}},
    {"expert": {"schedule": ("cross", "self", "cross")}, "flow": {"chunk": 5, "d_action": 3, "d_state": 4}},
], ids=str)  # fmt: skip
def test_other_sizes_and_options_survive_saving(name: str, changes: dict, tmp_path: Path) -> None:
    spec = registry.get_spec(name, "tiny")
    assert isinstance(spec, FeatureVLASpec)
    parts = {key: part and replace(getattr(spec, key), **part) for key, part in changes.items()}
    spec = replace(spec, **parts)
    torch.manual_seed(0)
    made = HookedVLA.from_network(spec, registry.build_network(spec).eval())
    made.save_pretrained(tmp_path)
    loaded = HookedVLA.from_pretrained(tmp_path)
    assert loaded.spec == spec
    noise = torch.randn(2, spec.flow.chunk, spec.flow.d_action)
    actions, cache = made.run_with_cache(observation(), noise=noise)
    assert torch.equal(loaded(observation(), noise).chunk, made(observation(), noise).chunk)
    assert actions.chunk.shape == (2, spec.flow.chunk, min(4, spec.flow.d_action))
    assert made.cache_size(observation()) == cache.nbytes


def test_expert_reads_text_and_images_in_turn() -> None:
    golden = read_golden("groot_n17")
    model = HookedVLA.from_pretrained(golden.folder).requires_grad_(False)
    _, cache = model.run_with_cache(golden.batch, "expert.blocks.*.cross_attn.hook_pattern", noise=golden.noise)
    for i in range(0, 8, 2):
        pattern = cache[f"expert.blocks.{i}.cross_attn.hook_pattern"]
        on_images = pattern.segment("image:0", axis="key").sum(-1)
        torch.testing.assert_close(on_images, torch.full_like(on_images, float(i % 4 == 2)))
        assert (pattern[:, 1, ..., :2] == 0).all()


def test_padding_is_read_as_the_public_model_reads_it(name: str, golden: Golden, model: HookedVLA) -> None:
    """Padded tokens' features reach the actions, through the adapter; a query that sees nothing reads nothing (N1.7),
    or everything evenly (N1.5 with eager attention, as the fixture was recorded)."""
    tokens, mask, _ = KEYS[name]
    changed = golden.batch | {tokens: golden.batch[tokens].masked_fill(golden.batch[mask] == 0, 5)}
    after = model.predict_action_chunk(changed, golden.noise)
    assert torch.equal(after[0], golden_row(model, golden)[0])
    assert not torch.equal(after[1], golden_row(model, golden)[1])
    _, cache = model.run_with_cache(golden.batch, "vlm.blocks.0.attn.hook_pattern", noise=golden.noise)
    blind = cache["vlm.blocks.0.attn.hook_pattern"][1, :, :2]
    expected = 1 / blind.shape[-1] if model.spec.padding_attends_evenly else 0.0
    torch.testing.assert_close(blind, torch.full_like(blind, expected))
    assert model.spec.padding_attends_evenly == (name == "groot_n15")


@pytest.mark.parametrize("wanted", ["vlm.blocks.*.hook_resid_pre", "vlm.*"])
def test_gradients_are_finite_where_a_query_sees_nothing(golden: Golden, wanted: str) -> None:
    """In fused attention, and in the explicit one that runs when patterns are cached."""
    model = HookedVLA.from_pretrained(golden.folder)
    _, cache = model.run_with_cache(golden.batch, wanted, noise=golden.noise, incl_bwd=True)
    gradients = [name for name in cache if name.endswith("_grad")]
    assert gradients and all(cache[name].isfinite().all() for name in gradients)


def golden_row(model: HookedVLA, golden: Golden) -> Tensor:
    return model.predict_action_chunk(golden.batch, golden.noise)


def test_embodiments_have_their_own_weights(golden: Golden, model: HookedVLA) -> None:
    changed = golden.batch | {"embodiment_id": torch.tensor([1, 0])}
    after = model.predict_action_chunk(changed, golden.noise)
    before = golden_row(model, golden)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_cached_prefix_equals_recomputing_it_every_step(golden: Golden, model: HookedVLA) -> None:
    net, inputs = model.net, model.prepare(golden.batch)
    x = golden.noise
    for step in range(4):
        bucket = torch.full((2,), 250 * step)
        x = x + 0.25 * net.expert(x, bucket, net.prefill(inputs))[1]
    assert torch.equal(x, model.predict_action_chunk(golden.batch, noise=golden.noise))


def test_batch_rows_are_independent(tiny: HookedVLA) -> None:
    inputs = tiny.prepare(observation())
    both = tiny.sample_actions(inputs, NOISE)
    for row in range(2):
        assert_close(tiny.sample_actions(inputs.rows([row]), NOISE[row : row + 1]), both[row : row + 1])


def test_patching_all_inputs_of_a_layer_reproduces_the_source(tiny: HookedVLA) -> None:
    a, b = observation(0, ("lift", "drop")), observation(1, ("drop", "lift"))
    wanted = ["expert.blocks.1.hook_resid_pre", "expert.blocks.[23].cross_attn.hook_[kv]", "expert.hook_noisy_actions"]
    expected, cache = tiny.run_with_cache(b, wanted, noise=NOISE)

    def from_b(value: Tensor, hook) -> Tensor:
        return cache[hook.name][hook.denoise_step]

    patched = tiny.run_with_hooks(a, [(wanted, from_b)], noise=NOISE)
    assert expected is not None
    assert torch.equal(patched.chunk, expected.chunk)
    assert not torch.equal(tiny(a, NOISE).chunk, expected.chunk)


def test_residual_stream_is_the_sum_of_what_was_written(golden: Golden, model: HookedVLA) -> None:
    _, cache = model.run_with_cache(golden.batch, noise=golden.noise)
    for pathway in ("vision", "vlm", "adapter", "expert"):
        parts, labels = cache.decompose_resid(pathway)
        last = cache.resid_labels(pathway)[-1]
        torch.testing.assert_close(parts.sum(0), cache[last], rtol=1e-4, atol=1e-4, msg=f"{pathway} {labels}")


def test_segments_cover_every_token_once_per_row(tiny: HookedVLA) -> None:
    inputs = tiny.prepare(observation())
    segments = tiny.segments(inputs)["vlm"]
    assert segments.present() == ["image:agent", "image:wrist", "language", "pad"]
    n_tokens = {len(row) for name in ("agent", "wrist") for row in segments.positions(f"image:{name}")}
    assert n_tokens == {16 if tiny.spec.name == "groot_n15" else 4}
    assert torch.stack([segments.mask(name) for name in segments.names]).sum(0).eq(1).all()
    expert = tiny.segments(inputs)["expert"].spans()
    assert [name for name, *_ in expert] == [name for name in ("state", "future", "action") if name != "future"
                                             or tiny.spec.flow.n_future]  # fmt: skip


def test_prompt_is_the_public_one(tiny: HookedVLA) -> None:
    inputs, tokenizer = tiny.prepare(observation()), tiny.processor.tokenizer.load()
    image = tiny.spec.image_token
    ids = [i for i in inputs.tokens[0][inputs.token_mask[0]].tolist() if i != image]
    expected = {
        "groot_n15": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<image 1><img></img><image 2><img></img>['Put the red block on the tray!']<|im_end|>\n<|im_start|>assistant\n",
        "groot_n17": "<|im_start|>user\n<|vision_start|><|vision_end|><|vision_start|><|vision_end|>"
        "put the red block on the tray<|im_end|>\n",
    }
    assert tokenizer.decode(ids) == expected[tiny.spec.name]
    assert not inputs.token_mask[1, 0] and inputs.token_mask[:, -1].all()


def test_positions_of_images_count_rows_and_columns() -> None:
    """As Qwen2-VL's paper draws it: pad, two words, an image of 2 × 3 tokens, two words."""
    is_image = torch.tensor([[False] * 3 + [True] * 6 + [False] * 2])
    valid = torch.tensor([[False] + [True] * 10])
    time, row, column = grid_positions(is_image, valid, (2, 3))[:, 0].tolist()
    assert time == [0, 0, 1, 2, 2, 2, 2, 2, 2, 5, 6]
    assert row == [0, 0, 1, 2, 2, 2, 3, 3, 3, 5, 6]
    assert column == [0, 0, 1, 2, 3, 4, 2, 3, 4, 5, 6]


def bad_batches(name: str) -> list[tuple[dict, str]]:
    tokens, mask, pixels = KEYS[name]
    batch = read_golden(name).batch
    wrong = [
        ({tokens: batch[tokens].float()}, tokens),
        ({tokens: batch[tokens] + 1000}, tokens),
        ({tokens: torch.where(batch[tokens] == 150, 3, batch[tokens])}, "places"),
        ({mask: batch[mask][:, 1:]}, mask),
        ({pixels: batch[pixels][1:]}, pixels),
        ({pixels: batch[pixels] * torch.nan}, pixels),
        ({"state": batch["state"][:, 0]}, "state"),
        ({"state": batch["state"] * torch.inf}, "state"),
        ({"embodiment_id": torch.tensor([1, 4])}, "embodiment_id"),
    ]
    if name == "groot_n17":
        wrong.append(({"image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 8]])}, "image_grid_thw"))
    return wrong


def test_bad_batches_are_named(name: str, golden: Golden, model: HookedVLA) -> None:
    for change, said in bad_batches(name):
        with pytest.raises(ValueError, match=said):
            model.predict_action_chunk(golden.batch | change, golden.noise)
    for key in (*KEYS[name], "state", "embodiment_id"):
        with pytest.raises(KeyError):
            model.predict_action_chunk({k: v for k, v in golden.batch.items() if k != key}, golden.noise)
    with pytest.raises(ValueError, match="noise"):
        model.predict_action_chunk(golden.batch, golden.noise[:, :3])


def test_bad_observations_are_named(tiny: HookedVLA) -> None:
    good = observation()
    with pytest.raises(KeyError, match="wrist"):
        tiny(replace(good, images={"agent": good.images["agent"]}), NOISE)
    with pytest.raises(ValueError, match="state"):
        tiny(replace(good, state=torch.zeros(2, 3)), NOISE)
    with pytest.raises(ValueError, match="NaN"):
        tiny(replace(good, state=torch.full((2, 4), torch.nan)), NOISE)
