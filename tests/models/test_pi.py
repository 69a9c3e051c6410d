"""π0 and π0.5 against the public implementation's recorded values, and what their wiring implies."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from public_checkpoints import GOLDEN, Golden, make_observation, read_golden
from safetensors.torch import load_file, save_file
from tolerance import assert_close
from torch import Tensor
from torch.nn import functional

from hooked_vla import HookedVLA, registry
from hooked_vla.models.network import expand_ties
from hooked_vla.policy import Normalizer
from hooked_vla.processors.pi import PiProcessor
from hooked_vla.spec import JointFlowVLASpec
from hooked_vla.weights import KeyRules, plan_loading

NAMES = ("pi0", "pi05")
_LEAVES = {
    "q_proj": "attn.hook_q", "k_proj": "attn.hook_k", "v_proj": "attn.hook_v", "o_proj": "hook_attn_out",
    "out_proj": "hook_attn_out", "down_proj": "hook_mlp_out", "fc2": "hook_mlp_out",
}  # fmt: skip
_WHOLE = {
    "model.state_proj": "expert.hook_embed_state",
    "model.action_time_mlp_out": "expert.hook_tokens",
    "model.time_mlp_out": "expert.hook_condition",
    "model.action_out_proj": "expert.hook_velocity",
    "model.paligemma_with_expert.paligemma.model.multi_modal_projector.linear": "connector.hook_out",
    "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.post_layernorm":
        "vision.ln_final.hook_normalized",
}  # fmt: skip
_STACKS = {"encoder": "vision", "language_model": "vlm", "gemma_expert.model": "expert"}


def hook_of(module: str, model: HookedVLA) -> str:
    """The hook point that holds what a module of the public implementation returns: sublayers before their gates."""
    if module in _WHOLE:
        return _WHOLE[module]
    match = re.fullmatch(r".*\.(encoder|language_model|gemma_expert\.model)\.layers\.(\d+)\.\w+\.(\w+)", module)
    assert match is not None, module
    name = f"{_STACKS[match.group(1)]}.blocks.{match.group(2)}.{_LEAVES[match.group(3)]}"
    ungated = name.removesuffix("_out") + "_ungated"
    return ungated if ungated in model.points else name


def as_recorded(value: Tensor, recorded: Tensor, module: str, hook: str) -> Tensor:
    """Our tensor in the recording's layout: heads merged, and one call a denoise step, camera or pass."""
    if "attn.hook_" in hook:
        value = value.flatten(-2)
    if hook.startswith(("vision", "connector")):
        value = value.unflatten(0, (-1, 3)).transpose(0, 1)
    elif hook.startswith("vlm"):
        value = value[None]
    elif hook == "expert.hook_embed_state":
        value = value.squeeze(-2)
    elif module == "model.action_time_mlp_out":
        value = value[..., 1:, :]
    # large recordings keep the first calls and rows only
    return value[: recorded.shape[0], : recorded.shape[1]]


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
    return HookedVLA.from_spec(name, "tiny").requires_grad_(False)


def test_actions_equal_the_public_implementation(golden: Golden, model: HookedVLA) -> None:
    assert_close(model.predict_action_chunk(golden.batch, noise=golden.noise), golden.actions)


def test_every_recorded_module_agrees_with_its_hook_point(golden: Golden, model: HookedVLA) -> None:
    _, cache = model.run_with_cache(golden.batch, noise=golden.noise)
    modules = [key for key in golden.recorded if key.startswith("ref.")]
    assert len(modules) > 40
    for key in modules:
        module, recorded = key.removeprefix("ref."), golden.recorded[key]
        hook = hook_of(module, model)
        ours = as_recorded(cache[hook], recorded, module, hook)
        if hook == "expert.hook_condition":
            recorded = functional.silu(recorded)
        assert ours.shape == recorded.shape, (module, hook, ours.shape)
        torch.testing.assert_close(ours, recorded, rtol=1e-5, atol=1e-5, msg=lambda text, m=module: f"{m}: {text}")


def test_bfloat16_stays_within_the_table(golden: Golden, name: str) -> None:
    model = HookedVLA.from_pretrained(golden.folder, dtype=torch.bfloat16)
    expert = model.net.expert
    assert model.net.vlm.embed.weight.dtype == expert.blocks[0].attn.q_proj.weight.dtype == torch.bfloat16
    for part in (model.net.vision, model.net.connector, expert.blocks[0].ln1, expert.ln_final, expert.action_out_proj):
        assert all(parameter.dtype == torch.float32 for parameter in part.parameters())
    actions = model.predict_action_chunk(golden.batch, noise=golden.noise)
    assert actions.dtype == torch.float32
    assert_close(actions, golden.actions, torch.bfloat16)


@pytest.mark.parametrize("layout", ["lerobot", "openpi", "no infix"])
def test_published_size_and_keys(name: str, layout: str) -> None:
    spec = registry.get_spec(name)
    with torch.device("meta"):
        net = registry.build_network(spec)
    published = {"pi0": 3_501_372_176, "pi05": 3_616_757_520}
    assert sum(parameter.numel() for parameter in net.parameters()) == spec.n_parameters == published[name]
    lines = (GOLDEN / "keys" / f"{name}.txt").read_text().splitlines()
    shapes = {key: tuple(map(int, shape.split("x"))) for key, shape in map(str.split, lines)}
    if layout == "openpi":
        shapes = {key.removeprefix("model."): shape for key, shape in shapes.items() if "embed_tokens" not in key}
    if layout == "no infix":
        shapes = {key.replace("vision_tower.vision_model.", "vision_tower."): each for key, each in shapes.items()}
    parameters = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    plan, dropped = plan_loading(KeyRules(spec.keys), shapes, parameters, expand_ties(spec.tied, parameters))
    assert sorted(source.key for source in plan.values()) == sorted(shapes)
    assert not dropped


def copy_checkpoint(golden: Golden, folder: Path, tensors: dict[str, Tensor], **options: object) -> Path:
    """The recorded checkpoint's files around other tensors and options."""
    config = json.loads((golden.folder / "config.json").read_text()) | options
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "geometry.json").write_bytes((golden.folder / "geometry.json").read_bytes())
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_openpi_keys_and_a_single_token_table_load(golden: Golden, tmp_path: Path) -> None:
    tensors = load_file(golden.folder / "model.safetensors")
    table = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    unembed = "model.paligemma_with_expert.paligemma.lm_head.weight"
    assert not torch.equal(tensors[table], tensors[unembed])
    # which of the two names the table goes by does not matter
    chunks = []
    for i, (held, left_out) in enumerate([(unembed, table), (table, unembed)]):
        (folder := tmp_path / str(i)).mkdir()
        some = {key: value for key, value in tensors.items() if key != left_out} | {held: tensors[table]}
        short = {key.removeprefix("model."): value for key, value in some.items()}
        model = HookedVLA.from_pretrained(copy_checkpoint(golden, folder, short))
        assert model.net.vlm.embed.weight is model.net.vlm.unembed.weight
        chunks.append(model.predict_action_chunk(golden.batch, noise=golden.noise))
        model.save_pretrained(tmp_path / f"again{i}")
        again = load_file(tmp_path / f"again{i}" / "model.safetensors")
        assert again.keys() == some.keys()
        assert all(torch.equal(again[key], value) for key, value in some.items())
    assert torch.equal(chunks[0], chunks[1])
    assert_close(chunks[0], golden.actions)


def test_both_token_tables_serve_their_own_purpose(golden: Golden, model: HookedVLA, tmp_path: Path) -> None:
    tensors = load_file(golden.folder / "model.safetensors")
    net, start = model.net, "model.paligemma_with_expert.paligemma."
    assert torch.equal(net.vlm.W_E, tensors[f"{start}model.language_model.embed_tokens.weight"])
    assert torch.equal(net.vlm.W_U, tensors[f"{start}lm_head.weight"].T)
    model.save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("n_layers", [1, 2])
def test_other_sizes_survive_saving(name: str, n_layers: int, tmp_path: Path) -> None:
    tiny = registry.get_spec(name, "tiny")
    assert isinstance(tiny, JointFlowVLASpec)
    heads = {"n_layers": n_layers, "n_heads": 6, "n_kv_heads": 2, "d_head": 8}
    spec = replace(
        tiny,
        vision=replace(tiny.vision, image_size=42, n_layers=n_layers, d_model=32, n_heads=2),
        vlm=replace(tiny.vlm, d_model=40, d_vocab=300, **heads),
        expert=replace(tiny.expert, d_model=24, d_vocab=11, **heads),
        flow=replace(tiny.flow, n_steps=3, chunk=5, d_action=6, d_state=7, min_period=1e-2, max_period=2.0),
        features=replace(tiny.features, cameras=("only",), resize=(42, 42), d_state=3, d_action=2),
    )
    torch.manual_seed(0)
    model = HookedVLA.from_network(spec, registry.build_network(spec).eval())
    model.save_pretrained(tmp_path)
    again = HookedVLA.from_pretrained(tmp_path)
    assert replace(again.spec, features=spec.features) == spec
    obs = make_observation()
    obs = replace(obs, images={"only": obs.images["agent"]}, state=torch.randn(2, 3))
    noise = torch.randn(2, 5, 6)
    assert again.predict_action_chunk(obs, noise).shape == (2, 5, 2)
    assert torch.equal(again.predict_action_chunk(obs, noise), model.predict_action_chunk(obs, noise))


def test_what_is_not_supported_is_refused(golden: Golden, tmp_path: Path) -> None:
    tensors = load_file(golden.folder / "model.safetensors")
    for option in ({"use_relative_actions": True}, {"use_proprioceptive_memory": True}, {"adapt_to_pi_aloha": True}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=True, which is not supported"):
            HookedVLA.from_pretrained(copy_checkpoint(golden, tmp_path, tensors, **option))
    with pytest.raises(ValueError, match=r"image_resolution is \[70, 70\], but the tower's positions are for 56"):
        HookedVLA.from_pretrained(copy_checkpoint(golden, tmp_path, tensors, image_resolution=[70, 70]))
    short = {key: value for key, value in tensors.items() if "gemma_expert.model.layers.2" not in key}
    with pytest.raises(ValueError, match="share keys and values, but their n_layers is 2 and 3"):
        HookedVLA.from_pretrained(copy_checkpoint(golden, tmp_path, short))
    bare = {key: value for key, value in tensors.items() if "embed_tokens" not in key and "ma.lm_head" not in key}
    with pytest.raises(ValueError, match=r"neither of .*embed_tokens"):
        HookedVLA.from_pretrained(copy_checkpoint(golden, tmp_path, bare))


def test_padding_does_not_reach_the_actions(golden: Golden, model: HookedVLA) -> None:
    tokens = golden.batch["observation.language.tokens"]
    mask = golden.batch["observation.language.attention_mask"]
    assert not mask.all()
    before = model.predict_action_chunk(golden.batch, noise=golden.noise)
    changed = golden.batch | {"observation.language.tokens": tokens.masked_fill(~mask, 5)}
    assert torch.equal(model.predict_action_chunk(changed, noise=golden.noise), before)
    longer = golden.batch | {
        "observation.language.tokens": functional.pad(tokens, (0, 5)),
        "observation.language.attention_mask": functional.pad(mask, (0, 5)),
    }
    assert_close(model.predict_action_chunk(longer, noise=golden.noise), before)


def test_a_camera_that_is_not_there_is_blank_and_hidden(tiny: HookedVLA) -> None:
    obs, other, noise = make_observation(seed=0), make_observation(seed=1), torch.randn(2, 8, 8)
    alone = replace(obs, images={"agent": obs.images["agent"]})
    inputs = tiny.prepare(alone)
    assert inputs.cameras == ("agent", "wrist")
    assert (inputs.images[:, 1] == -1).all()
    assert not inputs.image_mask[:, 1].any()
    hidden = {"wrist": torch.zeros(2, dtype=torch.bool)}
    images = {"agent": obs.images["agent"], "wrist": other.images["wrist"]}
    covered = tiny.predict_action_chunk(replace(obs, images=images, image_masks=hidden), noise)
    assert torch.equal(tiny.predict_action_chunk(alone, noise), covered)
    assert not torch.equal(tiny.predict_action_chunk(replace(obs, images=images), noise), covered)
    with pytest.raises(KeyError, match="missing cameras"):
        tiny.prepare(replace(obs, images={}))


def test_cached_prefix_equals_recomputing_it_every_step(golden: Golden, model: HookedVLA) -> None:
    net, inputs = model.net, model.prepare(golden.batch)
    assert isinstance(golden.noise, Tensor)
    x, dt = golden.noise, -1.0 / net.n_denoise_steps
    for step in range(net.n_denoise_steps):
        x = x + dt * net.expert(x, torch.full((2,), 1.0 + step * dt), net.prefill(inputs))[1]
    assert torch.equal(x[..., :7], model.predict_action_chunk(golden.batch, noise=golden.noise))


def test_batch_rows_are_independent(tiny: HookedVLA) -> None:
    inputs, noise = tiny.prepare(make_observation()), torch.randn(2, 8, 8)
    both = tiny.sample_actions(inputs, noise)
    for row in range(2):
        assert_close(tiny.sample_actions(inputs.rows([row]), noise[row : row + 1]), both[row : row + 1])


def test_patching_all_inputs_of_a_layer_reproduces_the_source(tiny: HookedVLA) -> None:
    """The expert's inputs at a layer: its residual stream, the time, and the prefix's keys and values from there on."""
    a, noise = make_observation(seed=0), torch.randn(2, 8, 8)
    # prompts of one length, for positions and masks follow it
    b = replace(make_observation(seed=1), state=a.state)
    wanted = ["expert.blocks.1.hook_resid_pre", "expert.blocks.[12].attn.hook_prefix_[kv]", "expert.hook_noisy_actions"]
    expected, cache = tiny.run_with_cache(b, wanted, noise=noise)
    edit = (wanted, lambda value, hook: cache[hook.name][hook.denoise_step])
    assert expected is not None
    assert torch.equal(tiny.run_with_hooks(a, [edit], noise=noise).chunk, expected.chunk)
    assert not torch.equal(tiny(a, noise).chunk, expected.chunk)


def test_last_residual_through_the_head_is_the_actions(golden: Golden, model: HookedVLA) -> None:
    expert = model.net.expert
    _, cache = model.run_with_cache(golden.batch, noise=golden.noise)
    last = cache[f"expert.blocks.{len(expert.blocks) - 1}.hook_resid_post"]
    x = golden.noise
    for step in range(model.n_denoise_steps):
        assert_close(cache["expert.hook_noisy_actions"][step], x)
        if expert.adaptive:
            final = expert.ln_final(last[step], cache["expert.hook_condition"][step])[0]
        else:
            final = expert.ln_final(last[step])
        x = x - expert.action_out_proj(final[:, -expert.chunk :]) / model.n_denoise_steps
    assert_close(cache["head.hook_actions"], x)


def test_who_sees_whom_in_the_expert(tiny: HookedVLA, name: str) -> None:
    _, cache = tiny.run_with_cache(make_observation(), "*.hook_pattern", noise=torch.randn(2, 8, 8))
    pattern = cache["expert.blocks.0.attn.hook_pattern"]
    assert (pattern.segment("action", axis="key")[..., -8:, :] > 0).all()
    assert (cache["vlm.blocks.0.attn.hook_pattern"].segment("image:*", axis="key") > 0).all()
    spans = tiny.segments(tiny.prepare(make_observation()))["expert"].spans()
    if name == "pi05":
        assert spans == [("action", 0, 8)]
        return
    assert spans == [("state", 0, 1), ("action", 1, 9)]
    from_state = pattern.segment("state", axis="query")
    seen = from_state.sum(dim=(0, 1, 2, 3)) > 0
    assert seen[-9]
    assert not seen[-8:].any()


def test_segments_cover_every_token_once_per_row(tiny: HookedVLA) -> None:
    segments = tiny.segments(tiny.prepare(make_observation()))
    assert segments["vlm"].present() == ["image:agent", "image:wrist", "language", "pad"]
    for each in segments.values():
        assert torch.stack([each.mask(segment) for segment in each.names]).sum(0).eq(1).all()


def test_gates_stand_between_a_sublayer_and_the_residual_stream() -> None:
    model = HookedVLA.from_spec("pi05", "tiny").requires_grad_(False)
    obs, noise = make_observation(), torch.randn(2, 8, 8)
    _, cache = model.run_with_cache(obs, "expert.*", noise=noise)
    for layer in range(3):
        block = f"expert.blocks.{layer}"
        for sublayer, norm in (("attn", "ln1"), ("mlp", "ln2")):
            gate = cache[f"{block}.{norm}.hook_ada_gate"][:, :, None]
            assert torch.equal(cache[f"{block}.hook_{sublayer}_ungated"] * gate, cache[f"{block}.hook_{sublayer}_out"])
    # a closed gate is an ablated sublayer
    closed = model.run_with_hooks(obs, [("expert.blocks.1.ln1.hook_ada_gate", lambda v, hook: v * 0)], noise=noise)
    ablated = model.run_with_hooks(obs, [("expert.blocks.1.hook_attn_out", lambda v, hook: v * 0)], noise=noise)
    assert torch.equal(closed.chunk, ablated.chunk)


def test_prompts_tell_task_and_state() -> None:
    state = torch.tensor([[-1.0, 1.0, 0.0, -1.01, 1 / 128], [0.0, 0.0, 0.0, 0.0, 0.999]])
    tasks = [" put_it\nthere\n", "lift"]
    assert HookedVLA.from_spec("pi0", "tiny").processor.prompts(tasks, state) == [" put_it\nthere\n", "lift\n"]
    # LeRobot 0.6.1 makes these prompts
    assert HookedVLA.from_spec("pi05", "tiny").processor.prompts(tasks, state) == [
        "Task: put it there, State: 0 255 128 -1 129;\nAction: ",
        "Task: lift, State: 128 128 128 128 255;\nAction: ",
    ]


def test_the_prompt_tells_the_normalised_state() -> None:
    model = HookedVLA.from_spec("pi05", "tiny")
    obs, noise = make_observation(), torch.randn(2, 8, 8)
    low, high = torch.full((4,), -2.0), torch.full((4,), 6.0)
    statistics = {key: {"q01": low, "q99": high} for key in ("observation.state", "action")}
    modes = {key: "QUANTILES" for key in statistics}
    # a state in other units, with statistics that bring it back, is the same to the model
    plain = model(obs, noise)
    model.processor.normalizer = Normalizer(modes, statistics)
    told = model(replace(obs, state=(obs.state + 1) / 2 * 8 - 2), noise)
    assert_close(told.normalized, plain.normalized)
    assert_close(told.chunk, (told.normalized + 1) / 2 * 8 - 2)
    assert not torch.equal(model(obs, noise).normalized, plain.normalized)


def test_images_are_padded_on_both_sides() -> None:
    resized = PiProcessor.resize(torch.ones(1, 3, 40, 80), 56, 56)
    assert resized.shape == (1, 3, 56, 56)
    assert_close(resized[0, 0, 14:42], torch.ones(28, 56))
    assert (resized[0, 0, :14] == 0).all()
    assert (resized[0, 0, 42:] == 0).all()
    # of an odd number of rows, the last one goes below
    odd = PiProcessor.resize(torch.ones(1, 3, 30, 57), 56, 56)
    assert (odd[0, 0].sum(1) > 0).nonzero().flatten().tolist() == list(range(13, 42))
