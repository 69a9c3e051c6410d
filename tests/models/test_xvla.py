"""X-VLA against the public implementation's recorded values, and what its wiring implies."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from public_checkpoints import GOLDEN, Golden, read_golden
from safetensors.torch import load_file, save_file
from tolerance import ATOL, assert_close
from torch import Tensor

from hooked_vla import HookedVLA, Observation, registry
from hooked_vla.components.davit import from_windows, to_windows
from hooked_vla.inputs import Segments
from hooked_vla.processors.xvla import axis_angle
from hooked_vla.spec import PromptedVLASpec
from hooked_vla.weights import KeyRules, plan_loading

TOKENS, MASK = "observation.language.tokens", "observation.language.attention_mask"
IMAGE_B, STATE = "observation.images.b", "observation.state"
_PARTS = {
    "window_attn.proj": "hook_attn_out", "channel_attn.proj": "hook_attn_out", "attn.proj": "hook_attn_out",
    "self_attn.out_proj": "hook_attn_out", "ffn.fc2": "hook_mlp_out", "mlp.fc2": "hook_mlp_out", "fc2": "hook_mlp_out",
    "self_attn.q_proj": "attn.hook_q", "self_attn.k_proj": "attn.hook_k", "self_attn.v_proj": "attn.hook_v",
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded() -> Golden:
    return read_golden("xvla")


@pytest.fixture(scope="module")
def _model(recorded: Golden) -> HookedVLA:
    return HookedVLA.from_pretrained(recorded.folder)


@pytest.fixture
def model(_model: HookedVLA) -> HookedVLA:
    _model.reset_hooks(including_permanent=True)
    _model.reset()
    return _model


@pytest.fixture(scope="module")
def tiny() -> HookedVLA:
    return HookedVLA.from_spec("xvla", size="tiny", seed=0)


@pytest.fixture
def folder(recorded: Golden, tmp_path: Path) -> Path:
    """A copy of the recorded checkpoint that a test may change."""
    return Path(shutil.copytree(recorded.folder, tmp_path / "checkpoint"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def observe(batch: int = 2, seed: int = 0) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    images = {
        camera: torch.randint(0, 256, (batch, 48, 64, 3), generator=generator, dtype=torch.uint8)
        for camera in ("agent", "wrist")
    }
    texts = ["put the red block on the tray", "lift"][:batch] + ["push"] * (batch - 2)
    return Observation(images, torch.randn(batch, 20, generator=generator), texts)


def draw(model: HookedVLA, batch: int = 2, seed: int = 1) -> Tensor:
    head = model.net.head
    return torch.randn(batch, head.chunk, head.d_action, generator=torch.Generator().manual_seed(seed))


def vendored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors under Microsoft's keys, as published files have them."""
    rules = [
        (r"(vision_tower\.convs\.\d+\.)conv\.", r"\1proj."),
        (r"\.(conv[12])\.(weight|bias)$", r".\1.fn.dw.\2"),
        (r"spatial_block\.norm1\.", "spatial_block.window_attn.norm."),
        (r"channel_block\.norm1\.", "channel_block.channel_attn.norm."),
        (r"(window|channel)_attn\.(qkv|proj)\.", r"\1_attn.fn.\2."),
        (r"_block\.norm2\.", "_block.ffn.norm."),
        (r"\.ffn\.(fc[12])\.", r".ffn.fn.net.\1."),
        (r"multi_modal_projector\.image_projection\.weight", "image_projection"),
        (r"multi_modal_projector\.image_position_embed\.", "image_pos_embed."),
        (r"multi_modal_projector\.", ""),
        (r"vlm\.language_model\.", "vlm.language_model.model."),
    ]
    found = {"model.vlm.language_model.final_logits_bias": torch.zeros(1, 128)}
    for key, value in tensors.items():
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = value.T.contiguous() if name.endswith(".image_projection") else value
    return found


def hook_of(module: str) -> str:
    """The hook point that holds what a module of the public implementation returns."""
    if module == "model.transformer.action_decoder":
        return "expert.hook_clean_actions"
    if match := re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.(.+)", module):
        return f"expert.blocks.{match.group(1)}.{_PARTS[match.group(2)]}"
    if match := re.fullmatch(r"model\.vlm\.language_model\.encoder\.layers\.(\d+)\.(.+)", module):
        return f"vlm.blocks.{match.group(1)}.{_PARTS[match.group(2)]}"
    match = re.fullmatch(r"model\.vlm\.vision_tower\.blocks\.(\d+)\.(\d+)\.(\w+)_block\.(.+)", module)
    assert match is not None, module
    stage, block, part, rest = match.groups()
    return f"vision.stages.{stage}.blocks.{block}.{part}.{_PARTS[rest]}"


def test_actions_equal_the_public_implementation(recorded: Golden, model: HookedVLA) -> None:
    assert_close(model.predict_action_chunk(recorded.batch, noise=recorded.noise), recorded.actions)
    assert_close(model.predict_action_chunk(recorded.batch, noise=[recorded.noise]), recorded.actions)


@torch.no_grad()
def test_every_recorded_module_agrees_with_its_hook_point(recorded: Golden, model: HookedVLA) -> None:
    _, cache = model.run_with_cache(recorded.batch, noise=recorded.noise)
    # the recording has one call for all cameras' images, batch row by batch row, as we have
    grids = model.net.vision.grids(64, 64)
    modules = [key for key in recorded.recorded if key.startswith("ref.")]
    assert len(modules) == 37
    for module in modules:
        theirs, hook = recorded.recorded[module], hook_of(module.removeprefix("ref."))
        ours = cache[hook].flatten(-2) if ".attn.hook_" in hook else cache[hook]
        ours = ours if hook.startswith("expert") else ours[None]
        if module.endswith("window_attn.proj"):
            # recorded window by window, with what fills windows up: that is cut off again before anything reads it
            grid = grids[int(module.split(".")[5])]
            inside = to_windows(torch.ones(1, grid[0] * grid[1], 1), grid, 3)[: theirs.shape[1]] == 1
            ours, theirs = to_windows(ours[0], grid, 3)[None] * inside, theirs * inside
        # large recordings keep the first calls and rows only
        ours = ours[: theirs.shape[0], : theirs.shape[1]]
        assert ours.shape == theirs.shape, (module, hook, ours.shape)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda text, m=module: f"{m}: {text}")


def test_bfloat16_stays_within_the_table(recorded: Golden) -> None:
    model = HookedVLA.from_pretrained(recorded.folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.net.parameters()} == {torch.bfloat16}
    actions = model.predict_action_chunk(recorded.batch, noise=recorded.noise)
    assert actions.dtype == torch.float32
    assert_close(actions, recorded.actions, torch.bfloat16)


@pytest.mark.parametrize(("layout", "n_keys"), [("native", 903), ("vendored", 904)])
def test_rules_consume_each_published_key_exactly_once(layout: str, n_keys: int) -> None:
    spec = registry.get_spec("xvla")
    with torch.device("meta"):
        net = registry.build_network(spec)
    assert sum(parameter.numel() for parameter in net.parameters()) == spec.n_parameters == 876_336_728
    rows = [line.split() for line in (GOLDEN / "keys" / f"xvla_{layout}.txt").read_text().splitlines() if line]
    shapes = {key: tuple(int(size) for size in shape.split("x")) for key, shape in rows}
    plan, dropped = plan_loading(KeyRules(spec.keys), shapes, {name: t.shape for name, t in net.state_dict().items()})
    used = {source.key for source in plan.values()}
    # the embedding's second name, and a bias for logits that no policy makes
    assert len(dropped) == n_keys - 902 and used | set(dropped) == set(shapes) and not used & set(dropped)


@torch.no_grad()
def test_both_published_layouts_load_and_one_is_written(recorded: Golden, model: HookedVLA, folder: Path) -> None:
    before = load_file(folder / "model.safetensors")
    save_file(vendored(before), folder / "model.safetensors")
    again = HookedVLA.from_pretrained(folder)
    expected = model.predict_action_chunk(recorded.batch, recorded.noise)
    assert torch.equal(again.predict_action_chunk(recorded.batch, recorded.noise), expected)
    again.save_pretrained(folder)
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("layout", [dict, vendored])
def test_the_embedding_may_have_either_of_its_names(recorded: Golden, model: HookedVLA, folder: Path, layout) -> None:
    tensors = layout(load_file(folder / "model.safetensors"))
    (embedding,) = (key for key in tensors if key.endswith("encoder.embed_tokens.weight"))
    shared = embedding.replace("encoder.embed_tokens", "shared")
    save_file(tensors | {shared: tensors[embedding].clone()}, folder / "model.safetensors")
    both = HookedVLA.from_pretrained(folder)
    save_file({key: t for key, t in tensors.items() if key != embedding} | {shared: tensors[embedding]},
              folder / "model.safetensors")  # fmt: skip
    other = HookedVLA.from_pretrained(folder)
    for each in (both, other):
        assert torch.equal(each.net.vlm.embed.weight, model.net.vlm.embed.weight)
    del tensors[embedding]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="missing checkpoint key .*embed_tokens"):
        HookedVLA.from_pretrained(folder)


# Properties.


def test_padding_text_is_attended_whatever_its_mask_says(recorded: Golden, model: HookedVLA) -> None:
    """The public implementation's rule: the padding's length and ids matter, a mask does not."""
    before = model.predict_action_chunk(recorded.batch, recorded.noise)
    tokens = recorded.batch[TOKENS]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 6:] = False
    assert torch.equal(model.predict_action_chunk(recorded.batch | {MASK: mask}, recorded.noise), before)
    longer = recorded.batch | {TOKENS: torch.nn.functional.pad(tokens, (0, 3), value=1)}
    assert not torch.allclose(model.predict_action_chunk(longer, recorded.noise), before, atol=1e-4)
    segments = model.segments(model.prepare(longer))["vlm"]
    assert segments.mask("pad").sum(1).tolist() == [3, 3]


@torch.no_grad()
def test_a_hidden_camera_leaves_zeros_that_are_attended(recorded: Golden, model: HookedVLA) -> None:
    hidden = {f"{IMAGE_B}_padding_mask": torch.tensor([False, True])}
    a = recorded.batch | hidden
    b = a | {IMAGE_B: recorded.batch[IMAGE_B].flip(-1)}
    before = model.predict_action_chunk(recorded.batch, recorded.noise)
    first, second = (model.predict_action_chunk(each, recorded.noise) for each in (a, b))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])
    assert not torch.equal(first[0], before[0]) and torch.equal(first[1], before[1])
    # the projection of zeros is its bias, in the places of the hidden camera and of the one that does not exist
    _, cache = model.run_with_cache(a, "expert.hook_embed_aux", noise=recorded.noise)
    aux, n = cache["expert.hook_embed_aux"][0], 5
    bias = model.net.expert.aux_proj.bias
    assert torch.equal(aux[0], bias.expand(2 * n, -1)) and torch.equal(aux[1, n:], bias.expand(n, -1))


@torch.no_grad()
def test_cached_encoder_equals_recomputing_it_every_step(recorded: Golden, model: HookedVLA) -> None:
    net, inputs = model.net, model.prepare(recorded.batch)
    clean, steps = torch.zeros_like(recorded.noise), net.n_denoise_steps
    for step in range(steps):
        time = torch.full((2,), 1.0 - step / steps)
        noisy = time[:, None, None] * recorded.noise + (1 - time)[:, None, None] * clean
        clean = net.expert(noisy, time, net.prefill(inputs))
    clean[..., [9, 19]] = clean[..., [9, 19]].sigmoid()
    assert_close(clean, model.predict_action_chunk(recorded.batch, noise=recorded.noise))


@torch.no_grad()
def test_batch_rows_are_independent(tiny: HookedVLA) -> None:
    inputs, noise = tiny.prepare(observe()), draw(tiny)
    both = tiny.sample_actions(inputs, noise)
    for row in range(2):
        assert_close(tiny.sample_actions(inputs.rows([row]), noise[row : row + 1]), both[row : row + 1])


@torch.no_grad()
def test_patching_all_inputs_of_a_layer_reproduces_the_source(tiny: HookedVLA) -> None:
    """Everything that the expert reads stands in its residual stream."""
    a, b, noise = observe(seed=0), observe(seed=1), draw(tiny)
    expected, cache = tiny.run_with_cache(b, "expert.blocks.1.hook_resid_pre", noise=noise)

    def from_b(value: Tensor, hook) -> Tensor:
        return cache[hook.name][hook.denoise_step]

    patched = tiny.run_with_hooks(a, [("expert.blocks.1.hook_resid_pre", from_b)], noise=noise)
    assert expected is not None and torch.equal(patched.chunk, expected.chunk)
    assert not torch.equal(tiny(a, noise).chunk, expected.chunk)


@torch.no_grad()
def test_each_step_begins_with_the_last_prediction_and_the_same_noise(recorded: Golden, model: HookedVLA) -> None:
    expert, steps = model.net.expert, model.n_denoise_steps
    _, cache = model.run_with_cache(recorded.batch, noise=recorded.noise)
    last = cache[f"expert.blocks.{len(expert.blocks) - 1}.hook_resid_post"]
    domain, clean = recorded.batch["domain_id"], torch.zeros_like(recorded.noise)
    for step in range(steps):
        time = 1 - step / steps
        noisy = time * recorded.noise + (1 - time) * clean
        noisy[..., [9, 19]] = 0
        assert_close(cache["expert.hook_noisy_actions"][step], noisy)
        clean = expert.action_out(expert.ln_final(last[step][:, : expert.chunk]), domain)
        assert_close(cache["expert.hook_clean_actions"][step], clean)
    clean[..., [9, 19]] = clean[..., [9, 19]].sigmoid()
    assert_close(cache["head.hook_actions"], clean)
    assert_close(cache["head.hook_actions"], recorded.actions)


@torch.no_grad()
def test_the_expert_sees_no_grippers_and_their_actions_are_probabilities(recorded: Golden, model: HookedVLA) -> None:
    before = model.predict_action_chunk(recorded.batch, recorded.noise)
    noise, state = recorded.noise.clone(), recorded.batch[STATE].clone()
    noise[..., [9, 19]] += 3
    state[..., [9, 19]] -= 3
    assert torch.equal(model.predict_action_chunk(recorded.batch | {STATE: state}, noise), before)
    assert before[..., [9, 19]].min() > 0 and before[..., [9, 19]].max() < 1


def test_the_domain_picks_weights_and_prompts(recorded: Golden, model: HookedVLA) -> None:
    before = model.predict_action_chunk(recorded.batch, recorded.noise)
    other = model.predict_action_chunk(recorded.batch | {"domain_id": torch.tensor([1, 3])}, recorded.noise)
    assert torch.equal(other[0], before[0]) and not torch.allclose(other[1], before[1], atol=1e-2)
    assert recorded.batch["domain_id"].tolist() == [1, 4]


def test_segments_cover_every_token_once_per_row(recorded: Golden, model: HookedVLA) -> None:
    inputs = model.prepare(recorded.batch)
    table = model.segments(inputs)
    expert: Segments = table["expert"]
    assert [name for name, _, _ in expert.spans()] == [
        "action", "image:a", "language", "image:b", "pad", "soft_prompt",
    ]  # fmt: skip
    lengths = {name: expert.mask(name).sum(1).tolist() for name in expert.names}
    assert lengths["action"] == [6, 6] and lengths["soft_prompt"] == [4, 4] and lengths["language"] == [10, 10]
    assert lengths["image:a"] == lengths["image:b"] == lengths["pad"] == [5, 5]
    for segments in table.values():
        assert torch.stack([segments.mask(name) for name in segments.names]).sum(0).eq(1).all()
    # 16 × 16 tokens in windows of 3 × 3: six a side, the last of which have two rows or columns beyond the edge
    windows = table["vision.stages.0.windows"]
    assert windows.labels.shape == (4 * 36, 9)
    assert int(windows.mask("pad").sum()) == 4 * (18 * 18 - 16 * 16)


@torch.no_grad()
def test_cached_windows_are_selected_by_camera_and_by_row(recorded: Golden, model: HookedVLA) -> None:
    name = "vision.stages.0.blocks.0.spatial.attn.hook_pattern"
    _, cache = model.run_with_cache(recorded.batch, name, noise=recorded.noise)
    assert cache[name].axes == ("window", "n_heads", "query", "key")
    assert cache[name].segment("image:b", axis="key", pad_value=0.0).shape[0] == 2 * 36
    second = cache.rows([1])
    assert torch.equal(second[name], cache[name][72:])
    assert second[name].segment("image:a", axis="query", pad_value=0.0).shape[0] == 36


@torch.no_grad()
def test_windows_do_not_see_each_other(model: HookedVLA) -> None:
    attention = model.net.vision.stages[0].blocks[0].spatial.attn
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 7 * 5, 16, generator=generator)
    out = attention(x, (7, 5))
    changed = x.clone()
    changed[0, 0] += 1
    moved = (attention(changed, (7, 5)) - out)[0].abs().amax(-1).unflatten(0, (7, 5)) > 0
    assert moved[:3, :3].all() and not moved[3:].any() and not moved[:, 3:].any()
    windows = to_windows(x, (7, 5), 3)
    assert windows.shape == (6, 9, 16) and torch.equal(from_windows(windows, (7, 5), 3), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rows_of_patterns_sum_to_one(dtype: torch.dtype, recorded: Golden) -> None:
    model = HookedVLA.from_pretrained(recorded.folder, dtype=dtype)
    _, cache = model.run_with_cache(recorded.batch, "*.hook_pattern", noise=recorded.noise)
    assert len(cache) == 2 * 5 + 2 + 3
    assert cache["vision.stages.3.blocks.0.channel.attn.hook_pattern"].shape == (4, 16, 8, 8)
    for name in cache:
        sums = cache[name].float().sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=ATOL[dtype], msg=name)


# Other sizes and options.


def _options(spec: PromptedVLASpec) -> dict[str, PromptedVLASpec]:
    vision = replace(
        spec.vision, d_model=(12, 24, 40), n_layers=(2, 1, 1), n_heads=(3, 2, 4), n_groups=(2, 3, 5),
        d_mlp=(24, 48, 80), kernel=(5, 3, 3), stride=(4, 2, 2), padding=(2, 1, 1), prenorm=(False, True, False),
        window=4,
    )  # fmt: skip
    one = replace(spec.features, cameras=("agent",))
    return {
        "no prompts": replace(spec, expert=replace(spec.expert, n_prompts=0)),
        "projections of each domain": replace(spec, expert=replace(spec.expert, domain_projections=True, d_time=7)),
        "joints": replace(
            spec, sampler=replace(spec.sampler, d_action=14, d_state=14, mode="joint", grippers=(6, 13), n_steps=2),
            features=replace(spec.features, d_state=14, d_action=14),
        ),
        "two arms of 6": replace(
            spec, sampler=replace(spec.sampler, mode="so101_bimanual", grippers=(5, 11), chunk=9),
            features=replace(spec.features, d_state=12, d_action=12),
        ),
        "one view": replace(spec, n_views=1, features=one),
        "three stages": replace(spec, vision=vision, vlm=replace(spec.vlm, d_model=32, n_heads=2, d_mlp=40)),
    }  # fmt: skip


@pytest.mark.parametrize("option", list(_options(registry.get_spec("xvla", "tiny"))))
@torch.no_grad()
def test_other_sizes_and_options_are_read_from_the_checkpoint(option: str, tmp_path: Path) -> None:
    spec = _options(registry.get_spec("xvla", "tiny"))[option]
    made = HookedVLA.from_network(spec, registry.build_network(spec).eval())
    made.save_pretrained(tmp_path)
    (tmp_path / "geometry.json").unlink()
    read = HookedVLA.from_pretrained(tmp_path)
    assert (read.spec.vision, read.spec.vlm, read.spec.expert) == (spec.vision, spec.vlm, spec.expert)
    assert (read.spec.sampler, read.spec.n_views, read.spec.features) == (spec.sampler, spec.n_views, spec.features)
    obs, noise = replace(observe(), state=torch.zeros(2, spec.features.d_state)), draw(made)
    actions, cache = read.run_with_cache(obs, noise=noise)
    assert actions is not None and actions.chunk.shape == (2, spec.sampler.chunk, spec.features.d_action)
    assert_close(actions.chunk, made.predict_action_chunk(obs, noise))
    assert read.cache_size(obs) == cache.nbytes
    assert read.dead_ends == (["expert.hook_embed_aux"] if spec.n_views == 1 else [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_proprio": False}, "use_proprio=False, which is not supported"),
        ({"tokenizer_padding_side": "left"}, "tokenizer_padding_side='left'"),
        ({"n_obs_steps": 2}, "n_obs_steps=2"),
        ({"action_mode": "tentacle"}, r"action_mode='tentacle'; supported: \['agibot_ee6d', 'auto'"),
        ({"action_mode": "joint"}, "'joint' has 14 channels, but the weights make 20"),
        ({"num_heads": 5}, "expert width 64 does not divide into 5 heads"),
        ({"dim_time": 24}, "grippers at"),
    ],
)
def test_options_that_would_change_the_computation_are_refused(folder: Path, changes: dict, message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        HookedVLA.from_pretrained(folder)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"scale_embedding": True}, "scale_embedding=True, which is not supported"),
        ("text_config", {"encoder_attention_heads": 7}, "encoder width 64 does not divide into 7 heads"),
        ("vision_config", {"model_type": "resnet"}, "model_type='resnet'"),
        ("vision_config", {"image_feature_source": ["last_frame"]}, "image_feature_source"),
        ("vision_config", {"num_heads": [2, 4, 8]}, r"4 vision stages, but config.json lists others for \['n_heads'\]"),
        ("vision_config", {"patch_prenorm": [True] * 4}, "patch_prenorm starts with True"),
    ],
)
def test_florence_options_are_refused(folder: Path, part: str, changes: dict, message: str) -> None:
    florence = json.loads((folder / "config.json").read_text())["florence_config"]
    edit_config(folder, florence_config=florence | {part: florence[part] | changes})
    with pytest.raises(ValueError, match=message):
        HookedVLA.from_pretrained(folder)


# Input.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"domain_id": torch.tensor([0, 5])}, ValueError, r"'domain_id' must be in 0\.\.4, got \[0, 5\]"),
        ({"domain_id": torch.tensor([0.5, 1.0])}, ValueError, "'domain_id' must be one integer"),
        ({"domain_id": torch.tensor([0, 1, 2])}, ValueError, "'domain_id' must be one integer, or one a row"),
        ({IMAGE_B: torch.full((2, 3, 64, 64), torch.nan)}, ValueError, "'b': images have NaN"),
        ({IMAGE_B: torch.zeros(2, 3, 32, 32)}, ValueError, "without resizing, all cameras need one image size"),
        ({TOKENS: torch.full((2, 10), 128)}, ValueError, r"must be ids in 0\.\.127"),
        ({TOKENS: torch.ones(2, 140, dtype=torch.long)}, ValueError, "145 tokens, but there are 128 positions"),
        ({TOKENS: torch.ones(2, 80, dtype=torch.long)}, ValueError, "for the expert, but there are 64 positions"),
        ({STATE: torch.zeros(2, 7)}, ValueError, r"observation.state must be \[batch, 20\]"),
    ],
)  # fmt: skip
def test_bad_batches_are_refused(recorded: Golden, model: HookedVLA, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        model.predict_action_chunk(recorded.batch | changes, recorded.noise)


def test_images_larger_than_the_tables_or_smaller_than_a_stage_are_refused(recorded: Golden, model: HookedVLA) -> None:
    only = {key: value for key, value in recorded.batch.items() if "image" not in key}
    for side, message in ((32 * 17, "17 × 17 places, but there are 16 rows"),):
        images = {f"observation.images.{camera}": torch.zeros(2, 3, side, side) for camera in "ab"}
        with pytest.raises(ValueError, match=message):
            model.predict_action_chunk(only | images, recorded.noise)
    with pytest.raises(ValueError, match="the image is too small"):
        model.net.vision.grids(0, 64)


def test_a_missing_camera_is_named(recorded: Golden, model: HookedVLA) -> None:
    batch = {key: value for key, value in recorded.batch.items() if key != IMAGE_B}
    with pytest.raises(KeyError, match=r"missing cameras \['b'\]"):
        model.predict_action_chunk(batch, recorded.noise)


@torch.no_grad()
def test_a_raw_observation_is_preprocessed_as_the_checkpoint_says(tiny: HookedVLA) -> None:
    obs, noise = observe(), draw(tiny)
    inputs = tiny.prepare(obs)
    # 64 × 48 pixels fit 64 × 64 without scaling: the padding above is 0 after normalisation
    red = obs.images["agent"][..., 0] / 255
    assert_close(inputs.images[:, 0, 0, 16:], (red - 0.485) / 0.229)
    assert (inputs.images[:, :, :, :16] == 0).all()
    text = obs.instruction[0].encode()
    ids = tiny.processor.tokenizer.load()(obs.instruction[0])["input_ids"]
    assert len(ids) == len(text) and inputs.tokens[0, : len(text)].tolist() == ids
    assert inputs.tokens.shape == (2, 48) and inputs.token_mask.sum(1).tolist() == [len(text), len("lift")]
    assert inputs.domain.tolist() == [0, 0]
    batch = {f"observation.images.{name}": inputs.images[:, i] for i, name in enumerate(inputs.cameras)}
    batch |= {STATE: obs.state, TOKENS: inputs.tokens}
    assert_close(tiny.predict_action_chunk(batch, noise), tiny.predict_action_chunk(obs, noise))


@torch.no_grad()
def test_processor_files_decide_domain_images_and_actions(tiny: HookedVLA, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    before = [
        {"registry_name": "tokenizer_processor", "config": {"max_length": 40, "padding": "max_length"}},
        {"registry_name": "xvla_image_to_float", "config": {}},
        {"registry_name": "xvla_add_domain_id", "config": {"domain_id": 3}},
    ]
    after = [{"registry_name": "xvla_rotation_6d_to_axis_angle", "config": {"expected_action_dim": 10}}]
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps({"name": "before", "steps": before}))
    (tmp_path / "policy_postprocessor.json").write_text(json.dumps({"name": "after", "steps": after}))
    model, obs, noise = HookedVLA.from_pretrained(tmp_path), observe(), draw(tiny)
    inputs = model.prepare(obs)
    assert inputs.domain.tolist() == [3, 3] and inputs.tokens.shape[1] == 40
    assert_close(inputs.images[:, 0, 0, 16:], obs.images["agent"][..., 0] / 255)
    actions = model(obs, noise)
    assert actions.chunk.shape == (2, 6, 7) and actions.normalized.shape == (2, 6, 20)
    assert_close(actions.chunk[..., :3], actions.normalized[..., :3])
    assert_close(actions.chunk[..., 3:6], axis_angle(actions.normalized[..., 3:9]))
    assert torch.equal(actions.chunk[..., 6], torch.where(actions.normalized[..., 9] > 0.5, 1.0, -1.0))
    model.processor.domain = 1
    assert model.prepare(obs).domain.tolist() == [1, 1]


def test_axis_angle_inverts_the_exponential_map() -> None:
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    vector = vector / vector.norm(dim=-1, keepdim=True) * torch.linspace(0, 3.1, 50, dtype=torch.float64)[:, None]
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    matrix = torch.matrix_exp(skew)
    angle = axis_angle(torch.cat([matrix[..., 0], matrix[..., 1]], dim=-1))
    # the columns are normalised with 1e-6 added to their length
    torch.testing.assert_close(angle, vector, rtol=0, atol=1e-5)
