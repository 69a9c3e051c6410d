"""π0-FAST against the public implementation's recorded values, and what generating tokens implies."""

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

from hooked_vla import HookedVLA, registry
from hooked_vla.components.rope import rotation
from hooked_vla.models.network import expand_ties
from hooked_vla.processors.pi_fast import FastTokenizer, inverse_cosines
from hooked_vla.spec import FastVLASpec
from hooked_vla.weights import KeyRules, plan_loading

_LEAVES = {
    "q_proj": "attn.hook_q", "k_proj": "attn.hook_k", "v_proj": "attn.hook_v", "o_proj": "hook_attn_out",
    "out_proj": "hook_attn_out", "down_proj": "hook_mlp_out", "fc2": "hook_mlp_out",
}  # fmt: skip
_WHOLE = {
    "model.paligemma_with_expert.paligemma.lm_head": "vlm.hook_logits",
    "model.paligemma_with_expert.paligemma.model.multi_modal_projector.linear": "connector.hook_out",
    "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.post_layernorm":
        "vision.ln_final.hook_normalized",
}  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read_golden("pi0_fast")


@pytest.fixture(scope="module")
def model(golden: Golden) -> HookedVLA:
    return HookedVLA.from_pretrained(golden.folder).requires_grad_(False)


@pytest.fixture(scope="module")
def tiny() -> HookedVLA:
    return HookedVLA.from_spec("pi0_fast", "tiny").requires_grad_(False)


def ours_of(key: str, model: HookedVLA, cache) -> Tensor:
    """Our tensor in the layout of a recording: of module, or module#call; call 0 is the prefix, 1 the first step."""
    module, _, call = key.removeprefix("ref.").partition("#")
    if module in _WHOLE:
        value, hook = cache[_WHOLE[module]], _WHOLE[module]
    else:
        match = re.fullmatch(r".*\.(encoder|language_model)\.layers\.(\d+)\.\w+\.(\w+)", module)
        assert match is not None, module
        stack = "vision" if match.group(1) == "encoder" else "vlm" if call == "0" else "decode"
        hook = f"{stack}.blocks.{match.group(2)}.{_LEAVES[match.group(3)]}"
        value = cache[hook] if stack != "decode" else cache[hook][int(call) - 1]
    value = value.flatten(-2) if "attn.hook_" in hook else value
    if hook.startswith(("vision", "connector")):
        return value.unflatten(0, (-1, 3)).transpose(0, 1)
    return value[None, :, None] if hook == "vlm.hook_logits" else value


def test_tokens_equal_the_public_implementation(golden: Golden, model: HookedVLA) -> None:
    tokens = model.generate_action_tokens(golden.batch)
    assert torch.equal(tokens, golden.recorded["output.tokens"])
    assert torch.equal(model.generate_action_tokens(golden.batch, max_new_tokens=5), tokens[:, :5])
    # no FAST tokenizer beside the checkpoint: the tokens are the chunk
    assert torch.equal(model.predict_action_chunk(golden.batch), tokens[..., None].float())


def test_every_recorded_module_agrees_with_its_hook_point(golden: Golden, model: HookedVLA) -> None:
    _, cache = model.run_with_cache(golden.batch)
    keys = [key for key in golden.recorded if key.startswith("ref.")]
    assert len(keys) > 50
    for key in keys:
        recorded, ours = golden.recorded[key], ours_of(key, model, cache)
        assert ours.shape == recorded.shape, (key, ours.shape)
        torch.testing.assert_close(ours, recorded, rtol=1e-5, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")


def test_bfloat16_scores_stay_within_the_table(golden: Golden) -> None:
    model = HookedVLA.from_pretrained(golden.folder, dtype=torch.bfloat16)
    assert model.net.decode.blocks[0].attn.q_proj.weight.dtype == torch.bfloat16
    assert model.net.decode.blocks[0].ln1.weight.dtype == torch.float32
    _, cache = model.run_with_cache(golden.batch, "vlm.hook_logits")
    recorded = golden.recorded["ref.model.paligemma_with_expert.paligemma.lm_head"][0, :, 0]
    # the fixture's last map is four times the usual size, and so is its rounding
    assert_close(cache["vlm.hook_logits"].float() / 4, recorded / 4, torch.bfloat16)


def test_published_size_and_keys() -> None:
    spec = registry.get_spec("pi0_fast")
    with torch.device("meta"):
        net = registry.build_network(spec)
    assert sum(parameter.numel() for parameter in net.parameters()) == spec.n_parameters == 3_449_982_704
    lines = (GOLDEN / "keys" / "pi0_fast.txt").read_text().splitlines()
    shapes = {key: tuple(map(int, shape.split("x"))) for key, shape in map(str.split, lines)}
    parameters = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    for lead in ("model.", ""):
        public = {lead + key.removeprefix("model."): shape for key, shape in shapes.items()}
        plan, dropped = plan_loading(KeyRules(spec.keys), public, parameters, expand_ties(spec.tied, parameters))
        assert sorted(source.key for source in plan.values()) == sorted(public)
        assert not dropped


def test_decoding_shares_the_prefix_models_weights(golden: Golden, model: HookedVLA, tmp_path: Path) -> None:
    shared = dict(model.net.vlm.named_parameters())
    for name, parameter in model.net.decode.named_parameters():
        assert parameter is shared[name]
    model.save_pretrained(tmp_path)
    again, tensors = load_file(tmp_path / "model.safetensors"), load_file(golden.folder / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], value) for key, value in tensors.items())


def test_one_token_table_serves_both_purposes(golden: Golden, tmp_path: Path) -> None:
    tensors = load_file(golden.folder / "model.safetensors")
    some = {key.removeprefix("model."): value for key, value in tensors.items() if "embed_tokens" not in key}
    for name in ("config.json", "geometry.json"):
        (tmp_path / name).write_bytes((golden.folder / name).read_bytes())
    save_file(some, tmp_path / "model.safetensors")
    model = HookedVLA.from_pretrained(tmp_path)
    assert model.net.vlm.embed.weight is model.net.vlm.unembed.weight
    assert not torch.equal(model.generate_action_tokens(golden.batch), golden.recorded["output.tokens"])


def test_decoding_with_a_cache_equals_reading_everything_again(golden: Golden, model: HookedVLA) -> None:
    """Tokens appended to the prefix, causally, have the residual streams that decoding them one by one gives."""
    _, cache = model.run_with_cache(golden.batch)
    tokens = cache["head.hook_action_tokens"]
    net, inputs = model.net, model.prepare(golden.batch)
    prefix, mask = net._text(inputs)
    valid = net.valid(inputs, mask)
    n_prefix, n_steps = valid.shape[1], model.n_denoise_steps
    x = torch.cat([cache["vlm.hook_tokens"], net.vlm.embed_tokens(tokens[:, :-1])], dim=1)
    visible = torch.zeros(1, n_prefix + n_steps, n_prefix + n_steps, dtype=torch.bool)
    visible[:, :, :n_prefix] = valid[:, None]
    visible[:, n_prefix:, n_prefix:] = torch.ones(n_steps, n_steps, dtype=torch.bool).tril()
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
    position = torch.cat([valid.long().cumsum(1) - 1, valid.sum(1, keepdim=True) + torch.arange(n_steps)], dim=1)
    by = rotation(position, net.vlm.d_head, net.vlm.rope_base)
    for i, block in enumerate(net.vlm.blocks):
        x = block(x, by, additive)
        steps = cache[f"decode.blocks.{i}.hook_resid_post"]
        assert_close(steps[:, :, 0].transpose(0, 1), x[:, n_prefix:])


def test_tokens_to_come_are_not_seen(tiny: HookedVLA) -> None:
    _, cache = tiny.run_with_cache(make_observation(), "decode.blocks.0.attn.hook_pattern")
    pattern = cache["decode.blocks.0.attn.hook_pattern"]
    assert pattern.axes == ("decode", "batch", "n_heads", "query", "key")
    own = pattern.segment("action", axis="key")[..., 0, :]
    for step in range(tiny.n_denoise_steps):
        assert (own[step, ..., : step + 1] > 0).all()
        assert (own[step, ..., step + 1 :] == 0).all()


def test_hooks_of_prefix_and_steps_are_apart(golden: Golden, model: HookedVLA) -> None:
    before = model.generate_action_tokens(golden.batch)
    with model.hooks([("decode.blocks.*.hook_resid_pre", lambda value, hook: value * 0)], at_steps=[3]):
        after = model.generate_action_tokens(golden.batch)
    # step i reads token i and chooses the next one
    assert torch.equal(after[:, :4], before[:, :4])
    assert not torch.equal(after, before)
    # what decoding reads of the prefix can change without the prefix, and so the first token, changing
    with model.hooks([("decode.blocks.*.attn.hook_prefix_v", lambda value, hook: value * 0)]):
        blind = model.generate_action_tokens(golden.batch)
    assert torch.equal(blind[:, 0], before[:, 0])
    assert not torch.equal(blind, before)


def test_generation_ends_when_every_row_has_ended(tiny: HookedVLA) -> None:
    obs = make_observation()
    tokens = tiny.generate_action_tokens(obs)
    row = tiny.prepare(obs).rows([0])
    end = int(tokens[0, 3])
    first = tokens[0].tolist().index(end)
    spec = replace(tiny.spec, fast=replace(tiny.spec.fast, end=end))
    model = HookedVLA.from_network(spec, tiny.net)
    try:
        tiny.net.spec = spec
        ended, cache = model.run_with_cache(row, "decode.hook_tokens")
    finally:
        tiny.net.spec = tiny.spec
    assert ended is not None
    assert ended.normalized.shape == (1, 8, 4)
    assert len(cache["decode.hook_tokens"]) == first


def test_limits_and_other_models(tiny: HookedVLA) -> None:
    for n in (0, 13):
        with pytest.raises(ValueError, match=rf"max_new_tokens must be in 1..12, got {n}"):
            tiny.generate_action_tokens(make_observation(), max_new_tokens=n)
    with pytest.raises(TypeError, match="does not generate tokens"):
        HookedVLA.from_spec("smolvla", "tiny").generate_action_tokens(make_observation())


def test_batch_rows_are_independent(tiny: HookedVLA) -> None:
    inputs = tiny.prepare(make_observation())
    both = tiny.generate_action_tokens(inputs)
    for row in range(2):
        assert torch.equal(tiny.generate_action_tokens(inputs.rows([row]))[0], both[row])


def test_segments_name_the_start_token_and_the_slots(tiny: HookedVLA) -> None:
    segments = tiny.segments(tiny.prepare(make_observation()))
    assert segments["vlm"].present() == ["image:agent", "image:wrist", "language", "special", "pad"]
    assert segments["vlm"].spans(row=0)[-1][0] == "special"
    assert segments["decode"].present() == segments["decode.slots"].present() == ["action"]
    for each in segments.values():
        assert torch.stack([each.mask(segment) for segment in each.names]).sum(0).eq(1).all()


def test_other_sizes_survive_saving(tmp_path: Path) -> None:
    tiny = registry.get_spec("pi0_fast", "tiny")
    assert isinstance(tiny, FastVLASpec)
    spec = replace(
        tiny,
        vlm=replace(tiny.vlm, d_model=40, n_layers=2, n_heads=6, n_kv_heads=2, d_head=8, d_vocab=600),
        fast=replace(tiny.fast, max_tokens=5, end=None, skip=64),
        features=replace(tiny.features, n_action_steps=3),
        d_state=9,
    )
    torch.manual_seed(0)
    model = HookedVLA.from_network(spec, registry.build_network(spec).eval())
    model.save_pretrained(tmp_path)
    again = HookedVLA.from_pretrained(tmp_path)
    assert replace(again.spec, features=spec.features) == spec
    obs = make_observation()
    assert again.predict_action_chunk(obs).shape == (2, 3, 4)
    assert torch.equal(again.generate_action_tokens(obs), model.generate_action_tokens(obs))
    config = json.loads((tmp_path / "config.json").read_text()) | {"temperature": 0.7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"temperature=0.7, which is not supported"):
        HookedVLA.from_pretrained(tmp_path)


def test_weights_on_disk_compute_the_same(tiny: HookedVLA, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    places = {"vision": "cpu", "connector": "cpu", "vlm": "disk", "decode": "disk", "head": "cpu"}
    model = HookedVLA.from_pretrained(tmp_path, device_map=places, offload_dir=tmp_path / "offloaded")
    obs = make_observation()
    assert torch.equal(model.generate_action_tokens(obs), tiny.generate_action_tokens(obs))


def fast_files(folder: Path, scale: float) -> None:
    """A FAST tokenizer in its public layout: byte-pair encoding of characters, one of them a pair."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    alphabet = {chr(100 + i): i for i in range(40)} | {"dd": 40}
    bpe = Tokenizer(models.BPE(alphabet, [("d", "d")]))
    bpe.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False).save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"min_token": -110, "scale": scale}))


def test_tokens_become_actions_by_the_checkpoints_tokenizer(tiny: HookedVLA, tmp_path: Path) -> None:
    spec = replace(tiny.spec, fast=replace(tiny.spec.fast, tokenizer="someone/fast", required=True))
    HookedVLA.from_network(spec, tiny.net).save_pretrained(tmp_path)
    fast_files(tmp_path / "fast", scale=4.0)
    model = HookedVLA.from_pretrained(tmp_path)
    # coefficients -10, -10 (one token), 2 and the end, then what is left out
    coefficients = [-10, -10, 2]
    action_ids = [768 - 1 - 128 - each for each in (40, 12)]
    start, (end,) = (model.processor.tokenizer.load().encode(text) for text in ("Action: ", "|"))
    assert end == model.spec.fast.end
    tokens = torch.tensor([[*start, *action_ids, end, 700]]).float()[..., None]
    chunk, normalized = model.processor.actions(tokens, raw=False)
    spectrum = torch.zeros(8, 4)
    spectrum[0, :3] = torch.tensor(coefficients) / 4.0
    assert_close(chunk, (inverse_cosines(8).float() @ spectrum)[None])
    assert torch.equal(chunk, normalized)
    with pytest.raises(ValueError, match="do not start with 'Action: '"):
        model.processor.actions(tokens[:, 1:], raw=False)


def test_tokens_that_are_no_actions_give_zeros(caplog: pytest.LogCaptureFixture) -> None:
    def decode(ids: list[int]) -> str:
        raise OverflowError("can't convert negative int to unsigned")

    assert (FastTokenizer(decode, -10, 4.0).actions([-5], 3, 2) == 0).all()
    assert "no action tokens" in caplog.text


def test_inverse_cosines_undo_cosines() -> None:
    n = 7
    x = torch.randn(n, dtype=torch.float64)
    grid = torch.arange(n, dtype=torch.float64)
    forward = torch.cos(torch.pi * (2 * grid[None] + 1) * grid[:, None] / (2 * n)) * (2 / n) ** 0.5
    forward[0] /= 2**0.5
    torch.testing.assert_close(inverse_cosines(n) @ (forward @ x), x)


def test_without_an_action_tokenizer_an_observation_has_no_actions(golden: Golden, tmp_path: Path) -> None:
    tiny = registry.get_spec("pi0_fast", "tiny")
    assert isinstance(tiny, FastVLASpec)
    spec = replace(tiny, fast=replace(tiny.fast, tokenizer="nobody/nothing"))
    model = HookedVLA.from_network(spec, registry.build_network(spec).eval())
    with pytest.raises(OSError, match=r"no action tokenizer .*generate_action_tokens"):
        model.predict_action_chunk(make_observation())
    assert model.generate_action_tokens(make_observation()).shape == (2, 12)
