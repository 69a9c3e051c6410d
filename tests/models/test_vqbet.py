"""VQ-BeT against the public implementation's recorded values, and what its wiring implies."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from public_checkpoints import Golden, make_observation, read_golden
from recipe import read_keys
from safetensors.torch import load_file, save_file
from tolerance import assert_close
from torch import Tensor

from hooked_vla import HookedVLA, Observation, registry
from hooked_vla.inputs import Draws
from hooked_vla.spec import CodePolicySpec
from hooked_vla.weights import KeyRules, plan_loading

_MODULES = {
    "vqbet.rgb_encoder": "connector.hook_out",
    "vqbet.policy.lm_head": "expert.hook_out",
    "vqbet.policy.transformer.h.{}": "expert.blocks.{}.hook_resid_post",
    "vqbet.policy.transformer.h.{}.attn.c_proj": "expert.blocks.{}.hook_attn_out",
    "vqbet.policy.transformer.h.{}.mlp.2": "expert.blocks.{}.hook_mlp_out",
}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read_golden("vqbet")


@pytest.fixture(scope="module")
def model(golden: Golden) -> HookedVLA:
    return HookedVLA.from_pretrained(golden.folder).requires_grad_(False)


def build(**codes) -> HookedVLA:
    """The tiny model with some of its code spec changed."""
    spec = registry.get_spec("vqbet", "tiny")
    assert isinstance(spec, CodePolicySpec)
    spec = replace(spec, codes=replace(spec.codes, **codes))
    torch.manual_seed(0)
    return HookedVLA.from_network(spec, registry.build_network(spec).eval()).requires_grad_(False)


@pytest.fixture(scope="module")
def tiny() -> HookedVLA:
    return build()


def observe(seed: int = 0) -> Observation:
    obs = make_observation(seed=seed)
    return replace(obs, images={"agent": obs.images["agent"]})


def races(rows: int = 20, seed: int = 0) -> Tensor:
    """Exponential draws for two rows, five queries and two codebooks of eight codes."""
    return torch.empty(rows, 8).exponential_(generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def edited(golden: Golden, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the fixture's checkpoint with some of config.json and of the tensors changed."""

    def write(change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict, **config) -> Path:
        stored = json.loads((golden.folder / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(stored | config))
        save_file(change(load_file(golden.folder / "model.safetensors")), tmp_path / "model.safetensors")
        return tmp_path

    return write


def test_actions_equal_the_public_implementation(golden: Golden, model: HookedVLA) -> None:
    assert_close(model.predict_action_chunk(golden.batch, golden.noise), golden.actions)


def test_every_recorded_module_agrees_with_its_hook_point(golden: Golden, model: HookedVLA) -> None:
    _, cache = model.run_with_cache(golden.batch, noise=golden.noise)
    modules = [key.removeprefix("ref.") for key in golden.recorded if key.startswith("ref.")]
    assert len(modules) == 8
    for module in modules:
        hook = _MODULES[re.sub(r"h\.\d+", "h.{}", module)].format(*re.findall(r"h\.(\d+)", module))
        ours = cache[hook][0] if hook.startswith("expert") else cache[hook]
        assert_close(ours, golden.recorded[f"ref.{module}"][0])


def test_recorded_codes_are_the_ones_drawn(golden: Golden, model: HookedVLA) -> None:
    _, cache = model.run_with_cache(golden.batch, "head.codebooks.*", noise=golden.noise)
    codes = [cache[f"head.codebooks.{i}.hook_code"] for i in range(2)]
    assert torch.equal(torch.stack([code.argmax(-1) for code in codes], dim=-1).flatten(), golden.noise[0].flatten())
    assert all((code.sum(-1) == 1).all() for code in codes)


def test_bfloat16_stays_within_the_table(golden: Golden) -> None:
    model = HookedVLA.from_pretrained(golden.folder, dtype=torch.bfloat16)
    actions = model.predict_action_chunk(golden.batch, golden.noise)
    assert actions.dtype == torch.float32
    assert_close(actions, golden.actions, torch.bfloat16)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_published_size_has_the_published_parameters_and_keys(norm: str) -> None:
    spec = registry.get_spec("vqbet")
    assert isinstance(spec, CodePolicySpec)
    spec = replace(spec, vision=replace(spec.vision, norm=norm))
    keys = {
        key: shape
        for key, shape in read_keys("vqbet").items()
        if norm == "batch" or not re.search(r"running_|num_batches", key)
    }
    with torch.device("meta"):
        net = registry.build_network(spec)
    assert sum(parameter.numel() for parameter in net.parameters()) == spec.n_parameters == 37_515_530
    parameters = {name: tensor.shape for name, tensor in net.state_dict().items()}
    plan, dropped = plan_loading(KeyRules(spec.keys), keys, parameters)
    assert set(plan) == set(parameters)
    assert not dropped


def test_saving_keeps_every_tensor_of_the_public_file(golden: Golden, model: HookedVLA, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (golden.folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


@pytest.mark.parametrize("options", [{"sequential": True}, {"n_ahead": 0, "chunk": 1}, {"n_codes": 16, "d_code": 8}])
def test_other_options_save_and_load(options: dict, tmp_path: Path) -> None:
    model = build(**options)
    model.save_pretrained(tmp_path)
    again = HookedVLA.from_pretrained(tmp_path)
    assert again.spec.codes == model.spec.codes
    torch.manual_seed(3)
    chunk = model(observe()).chunk
    torch.manual_seed(3)
    assert torch.equal(again(observe()).chunk, chunk)
    assert chunk.shape == (2, model.spec.codes.chunk, 4)


def test_sequential_codes_are_two_draws_and_the_second_knows_the_first() -> None:
    model = build(sequential=True)
    draws = [races(10, seed=1), races(10, seed=2)]
    _, cache = model.run_with_cache(observe(), "head.codebooks.1.hook_logits", noise=draws)

    def other_code(value: Tensor, hook) -> Tensor:
        return value.roll(1, dims=-1)

    with model.hooks([("head.codebooks.0.hook_code", other_code)]):
        _, after = model.run_with_cache(observe(), "head.codebooks.1.hook_logits", noise=draws)
    assert not torch.equal(cache["head.codebooks.1.hook_logits"], after["head.codebooks.1.hook_logits"])


def test_tokens_are_image_state_and_query_of_each_step(tiny: HookedVLA) -> None:
    segments = tiny.segments(tiny.prepare(observe()))["expert"]
    assert [name for name, _, _ in segments.spans()] == ["image:agent", "state", "action"] * 3
    _, cache = tiny.run_with_cache(observe(), "expert.*", noise=races())
    embedded = cache["expert.hook_embed"]
    assert torch.equal(embedded.segment("state")[0], cache["expert.hook_embed_state"][0])
    assert torch.equal(embedded.segment("action")[0], cache["expert.hook_embed_action"][0])
    pattern = cache["expert.blocks.0.attn.hook_pattern"]
    assert (pattern.triu(1) == 0).all()


def test_what_comes_after_the_present_query_does_not_reach_the_actions(tiny: HookedVLA) -> None:
    """Tokens 9 and 10 are queries for chunks to come: they draw codes, but nothing that acts reads them."""
    plain = tiny(observe(), races()).chunk
    for first, reaches in ((9, False), (8, True)):

        def shift(value: Tensor, hook, first=first) -> Tensor:
            value[:, first:] += 1
            return value

        moved = tiny.run_with_hooks(observe(), [("expert.hook_tokens", shift)], noise=races()).chunk
        assert torch.equal(moved, plain) != reaches


def test_hooks_cannot_change_parameters_in_place(tiny: HookedVLA) -> None:
    before = {name: each.clone() for name, each in tiny.net.state_dict().items()}

    def destroy(value: Tensor, hook) -> None:
        value.zero_()

    tiny.run_with_hooks(observe(), [(["expert.hook_embed_action", "expert.hook_pos_embed"], destroy)], noise=races())
    assert all(torch.equal(each, before[name]) for name, each in tiny.net.state_dict().items())


def test_actions_are_what_the_codes_decode_to_plus_the_offset(tiny: HookedVLA) -> None:
    actions, cache = tiny.run_with_cache(observe(), "head.*", noise=races())
    head = tiny.net.head
    codes = [cache[f"head.codebooks.{i}.hook_code"] for i in range(2)]
    vectors = sum(head.codebooks[i].embed[0][codes[i].argmax(-1)] for i in range(2))
    assert_close(cache["head.hook_code_sum"], vectors)
    present = (cache["head.hook_decoded"] + cache["head.hook_offset"])[:, 2]
    assert actions is not None
    assert_close(actions.normalized, present.unflatten(-1, (4, 4)))


def test_forcing_a_code_is_drawing_it(tiny: HookedVLA) -> None:
    options = torch.randint(0, 8, (20, 1), generator=torch.Generator().manual_seed(4))
    drawn = tiny(observe(), options).chunk
    by_codebook = options.reshape(2, 5, 2)

    def force(value: Tensor, hook) -> Tensor:
        book = int(hook.name.split(".")[2])
        return torch.nn.functional.one_hot(by_codebook[..., book], 8).to(value.dtype)

    assert torch.equal(tiny.run_with_hooks(observe(), [("*.hook_code", force)], noise=races()).chunk, drawn)

    def certain(value: Tensor, hook) -> Tensor:
        return 100 * force(value, hook)

    assert torch.equal(tiny.run_with_hooks(observe(), [("head.*.hook_logits", certain)], noise=races()).chunk, drawn)


def test_choices_follow_the_weights_and_given_draws_are_checked() -> None:
    weights = torch.tensor([[1.0, 2.0, 5.0]]).expand(4000, 3)
    torch.manual_seed(0)
    raced = torch.empty(4000, 3).exponential_()
    for draws in (Draws(None, torch.device("cpu")), Draws(raced, torch.device("cpu"))):
        shares = draws.choice(weights).flatten().bincount(minlength=3) / 4000
        torch.testing.assert_close(shares, torch.tensor([0.125, 0.25, 0.625]), rtol=0, atol=0.03)
    for wrong in (torch.full((4000, 1), 3), torch.zeros(4000, dtype=torch.long), torch.zeros(4000, 2)):
        with pytest.raises(ValueError, match=r"must be options 0..2 as integers \[4000, 1\]"):
            Draws(wrong, torch.device("cpu")).choice(weights)
    with pytest.raises(ValueError, match="needs more"):
        Draws([], torch.device("cpu")).choice(weights)


def test_batch_rows_are_independent(tiny: HookedVLA) -> None:
    inputs, draws = tiny.prepare(observe()), races()
    both = tiny.sample_actions(inputs, draws)
    for row in range(2):
        alone = tiny.sample_actions(inputs.rows([row]), draws.unflatten(0, (2, -1))[row])
        assert_close(alone, both[row : row + 1])


def test_select_action_works_through_the_chunk_and_remembers(tiny: HookedVLA) -> None:
    observations = [observe(seed) for seed in range(5)]
    tiny.reset()
    actions = torch.stack([tiny.select_action(obs, races()) for obs in observations], dim=1)
    assert torch.equal(actions[:, :4], tiny(observations[0], races()).chunk)
    parts = [tiny.prepare(obs) for obs in observations[2:]]
    assert torch.equal(actions[:, 4], tiny(parts[2].follow(parts[:2]), races()).chunk[:, 0])


@pytest.mark.parametrize(
    ("option", "value"),
    [("gpt_n_head", 5), ("action_chunk_size", 4), ("n_action_pred_token", 0), ("n_obs_steps", 3),
     ("input_features", {"observation.state": {"type": "STATE", "shape": [6]},
                         "observation.environment_state": {"type": "ENV", "shape": [3]}})],
)  # fmt: skip
def test_options_that_are_not_supported_are_refused(edited, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"config.json"):
        HookedVLA.from_pretrained(edited(**{option: value}))


def test_a_quantiser_that_was_never_trained_is_announced(edited, caplog) -> None:
    untrained = {"vqbet.action_head.vqvae_model.discretized": torch.tensor(False)}
    HookedVLA.from_pretrained(edited(lambda tensors: tensors | untrained))
    assert "never trained" in caplog.text
