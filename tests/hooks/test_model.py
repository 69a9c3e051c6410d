"""Running with hooks: what they see, what they may return, and that they never outlive their welcome."""

import traceback

import pytest
import torch
from public_checkpoints import make_observation
from torch import Tensor

from hooked_vla import HookedVLA, Observation

RESID = "vlm.blocks.1.hook_resid_post"
EXPERT = "expert.blocks.2.hook_resid_post"


def no_listener_left(model: HookedVLA) -> bool:
    return not any(point.listeners for point in model.points.values())


def test_hooks_replace_or_keep_values(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    plain = tiny_model(observation, noise).chunk
    kept = tiny_model.run_with_hooks(observation, [(RESID, lambda value, hook: None)], noise=noise)
    changed = tiny_model.run_with_hooks(observation, [(RESID, lambda value, hook: -value)], noise=noise)
    assert torch.equal(kept.chunk, plain)
    assert not torch.equal(changed.chunk, plain)
    assert no_listener_left(tiny_model)


def test_hooks_know_where_they_are(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    seen = []

    def look(value: Tensor, hook) -> None:
        seen.append((hook.name, hook.pathway, hook.layer, hook.denoise_step, tuple(value.shape)))
        assert hook.segments.labels.shape == (value.shape[0], value.shape[1])
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1

    tiny_model.run_with_hooks(observation, [([RESID, EXPERT], look)], noise=noise)
    assert [row[:4] for row in seen] == [
        (RESID, "vlm", 1, None),
        *((EXPERT, "expert", 2, step) for step in range(tiny_model.n_denoise_steps)),
    ]
    assert tiny_model.points[EXPERT].ctx == {"calls": tiny_model.n_denoise_steps}

    def look_at_pattern(value: Tensor, hook) -> None:
        assert hook.segments.present() == ["action"]
        assert hook.key_segments.present() == ["image:agent", "image:wrist", "language", "state", "pad", "action"]
        assert hook.key_segments.labels.shape == (value.shape[0], value.shape[-1])

    site = "expert.blocks.0.attn.hook_pattern"
    tiny_model.run_with_hooks(observation, [(site, look_at_pattern)], noise=noise)


def test_at_steps_limits_what_fires(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    steps = []
    tiny_model.run_with_hooks(
        observation, [(EXPERT, lambda v, hook: steps.append(hook.denoise_step))], noise=noise, at_steps=[1, 3]
    )
    assert steps == [1, 3]
    _, cache = tiny_model.run_with_cache(observation, [EXPERT, RESID], noise=noise, at_steps=[3])
    assert cache[EXPERT].shape[0] == 1 and cache[RESID].ndim == 3
    for wrong in ([4], [-1], []):
        with pytest.raises(ValueError, match=r"denoise steps are 0\.\.3"):
            tiny_model.run_with_hooks(observation, [(EXPERT, lambda v, h: None)], at_steps=wrong)


def test_hooks_work_through_the_policy_entry_points(
    tiny_model: HookedVLA, observation: Observation, noise: Tensor
) -> None:
    plain = tiny_model.predict_action_chunk(observation, noise)
    with tiny_model.hooks([("expert.hook_velocity", lambda value, hook: value * 0)]):
        assert torch.allclose(tiny_model.predict_action_chunk(observation, noise), noise[..., :4])
        assert torch.allclose(tiny_model.select_action(observation, noise), noise[:, 0, :4])
    assert torch.equal(tiny_model.predict_action_chunk(observation, noise), plain)


def test_handles_permanent_hooks_and_reset(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    plain = tiny_model(observation, noise).chunk
    temporary = tiny_model.add_hook(RESID, lambda value, hook: value + 1)
    permanent = tiny_model.add_perma_hook(EXPERT, lambda value, hook: value * 2)
    both = tiny_model(observation, noise).chunk
    tiny_model.reset_hooks()
    only_permanent = tiny_model(observation, noise).chunk
    assert not torch.equal(both, only_permanent) and not torch.equal(only_permanent, plain)
    temporary.remove()
    permanent.remove()
    permanent.remove()
    assert torch.equal(tiny_model(observation, noise).chunk, plain)
    tiny_model.add_perma_hook(RESID, lambda value, hook: value)
    tiny_model.reset_hooks(including_permanent=True)
    assert no_listener_left(tiny_model)
    with tiny_model.add_hook(RESID, lambda value, hook: value):
        assert not no_listener_left(tiny_model)
    assert no_listener_left(tiny_model)


def test_a_run_leaves_other_peoples_hooks_alone(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    calls = []
    mine = tiny_model.add_hook(RESID, lambda value, hook: calls.append(hook.name))
    tiny_model.run_with_hooks(observation, [(RESID, lambda value, hook: value)], noise=noise)
    tiny_model.run_with_cache(observation, RESID, noise=noise)
    with tiny_model.hooks([(RESID, lambda value, hook: value)]):
        tiny_model(observation, noise)
    assert calls == [RESID] * 3
    mine.remove()
    assert no_listener_left(tiny_model)


def test_order_of_hooks(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    tiny_model.add_hook(RESID, lambda value, hook: value * 0 + 3)
    tiny_model.add_hook(RESID, lambda value, hook: value + 1)
    tiny_model.add_hook(RESID, lambda value, hook: value * 0 + 10, prepend=True)
    _, cache = tiny_model.run_with_cache(observation, RESID, noise=noise)
    assert (cache[RESID] == 4).all()


def test_an_exception_in_a_hook_names_it_and_leaves_nothing(
    tiny_model: HookedVLA, observation: Observation, noise: Tensor
) -> None:
    def failing_hook(value: Tensor, hook) -> None:
        if hook.denoise_step == 2:
            raise ZeroDivisionError("from the user")

    for run in (
        lambda: tiny_model.run_with_hooks(observation, [(EXPERT, failing_hook)], noise=noise),
        lambda: tiny_model.add_hook(EXPERT, failing_hook) and tiny_model.run_with_cache(observation, noise=noise),
    ):
        with pytest.raises(ZeroDivisionError) as error:
            run()
        text = "".join(traceback.format_exception(error.value))
        assert f"raised by hook 'failing_hook' at {EXPERT}, denoise step 2" in text
        tiny_model.reset_hooks()
        assert no_listener_left(tiny_model)


def test_an_exception_in_the_forward_leaves_no_hook(tiny_model: HookedVLA, observation: Observation) -> None:
    with pytest.raises(ValueError, match="noise must be"):
        tiny_model.run_with_hooks(observation, [(RESID, lambda v, h: None)], noise=torch.zeros(1))
    with pytest.raises(ValueError, match="noise must be"):
        tiny_model.run_with_cache(observation, noise=torch.zeros(1))
    with pytest.raises(KeyError), tiny_model.hooks([(RESID, lambda v, h: v), ("no.such.site", lambda v, h: v)]):
        pass
    assert no_listener_left(tiny_model)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda v: v[:, :1], ValueError, r"vlm.blocks.1.hook_resid_post returned shape \(2, 1, 64\); expected \(2, 3"),
        (lambda v: v.double(), ValueError, r"returned dtype torch.float64; expected torch.float32"),
        (lambda v: v.to("meta"), ValueError, r"returned a tensor on meta; expected cpu"),
        (lambda v: 3, TypeError, r"hook_resid_post returned int; expected a Tensor"),
    ],
)
def test_a_wrong_return_names_site_expected_and_got(
    returned, error, message, tiny_model: HookedVLA, observation: Observation
) -> None:
    with pytest.raises(error, match=message):
        tiny_model.run_with_hooks(observation, [(RESID, lambda value, hook: returned(value))])


def test_unknown_sites_and_directions(tiny_model: HookedVLA, observation: Observation) -> None:
    for run in (
        lambda: tiny_model.add_hook("vlm.blocks.99.hook_resid_post", lambda v, h: v),
        lambda: tiny_model.run_with_cache(observation, ["head.hook_actions", "vlm.blocks.99.hook_resid_post"]),
    ):
        with pytest.raises(KeyError, match=r"99.*nearest: .*, .*, "):
            run()
    with pytest.raises(ValueError, match="'fwd' or 'bwd'"):
        tiny_model.add_hook(RESID, lambda v, h: v, dir="sideways")


def test_a_hook_that_never_fires_is_an_error(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    with pytest.raises(RuntimeError, match=f"never fired.*{EXPERT}"), torch.no_grad():
        tiny_model.run_with_hooks(observation, bwd_hooks=[(EXPERT, lambda g, h: None)], noise=noise)
    with pytest.raises(RuntimeError, match="never fired"):
        tiny_model.run_with_cache(observation, [RESID, EXPERT], noise=noise, stop_at=RESID)
    with tiny_model.hooks([(RESID, lambda v, h: v)]):
        pass


def test_backward_hooks_see_and_replace_gradients(
    tiny_model: HookedVLA, observation: Observation, noise: Tensor
) -> None:
    steps, weight = [], tiny_model.net.vlm.blocks[0].mlp.down_proj.weight

    def gradient_of_weight(bwd_hooks: list) -> Tensor:
        tiny_model.zero_grad()
        tiny_model.run_with_hooks(observation, bwd_hooks=bwd_hooks, noise=noise).chunk.sum().backward()
        assert weight.grad is not None
        return weight.grad.clone()

    plain = gradient_of_weight([])
    seen = gradient_of_weight([(EXPERT, lambda grad, hook: steps.append(hook.denoise_step))])
    doubled = gradient_of_weight([("head.hook_actions", lambda grad, hook: grad * 2)])
    assert sorted(steps) == list(range(tiny_model.n_denoise_steps))
    assert torch.equal(seen, plain) and torch.allclose(doubled, plain * 2) and plain.abs().sum() > 0
    tiny_model.zero_grad()


def test_in_place_edits_do_not_leak_into_later_steps_or_inputs(
    tiny_model: HookedVLA, observation: Observation, noise: Tensor
) -> None:
    """A hook may write into its value; what is read again (prefix keys, the caller's noise) must not change."""

    def zero_at_first_step(value: Tensor, hook) -> Tensor | None:
        if hook.denoise_step == 0:
            value.zero_()
        return value

    def zero_a_copy_at_first_step(value: Tensor, hook) -> Tensor | None:
        return torch.zeros_like(value) if hook.denoise_step == 0 else None

    before = noise.clone()
    for site in ("expert.blocks.*.hook_prefix_k", "expert.blocks.1.cross_attn.hook_v", "expert.hook_noisy_actions"):
        with torch.no_grad():
            in_place = tiny_model.run_with_hooks(observation, [(site, zero_at_first_step)], noise=noise)
            copied = tiny_model.run_with_hooks(observation, [(site, zero_a_copy_at_first_step)], noise=noise)
        assert torch.equal(in_place.chunk, copied.chunk), site
    assert torch.equal(noise, before)


def test_the_experts_view_of_the_prefix_is_its_own(
    tiny_model: HookedVLA, observation: Observation, noise: Tensor
) -> None:
    edits = [("expert.blocks.0.attn.hook_prefix_v", lambda value, hook: value * 0)]
    with torch.no_grad(), tiny_model.hooks(edits):
        _, cache = tiny_model.run_with_cache(observation, noise=noise)
    with torch.no_grad():
        _, plain = tiny_model.run_with_cache(observation, noise=noise)
    assert (cache["expert.blocks.0.attn.hook_prefix_v"] == 0).all()
    for name in (n for n in plain if n.startswith("vlm.")):
        assert torch.equal(cache[name], plain[name]), name
    assert not torch.equal(cache["head.hook_actions"], plain["head.hook_actions"])


def test_editing_prefix_keys_of_the_vlm_reaches_both_kinds_of_expert_layer(
    tiny_model: HookedVLA, observation: Observation, noise: Tensor
) -> None:
    for layer, kind in ((0, "attn"), (1, "cross_attn")):
        edits = [(f"vlm.blocks.{layer}.attn.hook_rot_k", lambda value, hook: value * 2)]
        with torch.no_grad(), tiny_model.hooks(edits):
            _, cache = tiny_model.run_with_cache(observation, f"*.blocks.{layer}.*hook_*_k", noise=noise)
        key, read = (cache[f"{p}.hook_{n}_k"] for p, n in ((f"vlm.blocks.{layer}.attn", "rot"),
                                                            (f"expert.blocks.{layer}.{kind}", "prefix")))  # fmt: skip
        assert all(torch.equal(read[step], key) for step in range(4))


def test_results_do_not_depend_on_earlier_observations(tiny_model: HookedVLA, noise: Tensor) -> None:
    first, second = make_observation(seed=1), make_observation(seed=2)
    alone = tiny_model(second, noise).chunk
    tiny_model(first, noise)
    assert torch.equal(tiny_model(second, noise).chunk, alone)


def test_sample_actions_knows_its_own_inputs(tiny_model: HookedVLA, noise: Tensor) -> None:
    """Also right after a run on other instructions."""
    lengths = []
    look = (RESID, lambda value, hook: lengths.append(hook.segments.mask("language").sum(1).tolist()))
    tiny_model(make_observation(instruction=["a", "bb"]), noise)
    with tiny_model.hooks([look]):
        tiny_model.sample_actions(tiny_model.prepare(make_observation(instruction=["cc", "dddd"])), noise)
    assert lengths == [[3, 5]]
    with pytest.raises(RuntimeError, match="never fired"), tiny_model.hooks(bwd_hooks=[look]), torch.no_grad():
        tiny_model.sample_actions(tiny_model.prepare(make_observation()), noise)


def test_a_hook_may_run_the_model_itself(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    steps, inner = [], make_observation(seed=5, instruction=["x", "y"])

    def run_inside(value: Tensor, hook) -> None:
        if hook.denoise_step == 1 and len(steps) == 1:
            steps.append("inside")
            tiny_model.add_hook("head.hook_actions", lambda v, h: None).remove()
            with tiny_model.hooks():
                other.append(tiny_model(inner, noise).chunk)
        steps.append(hook.denoise_step)
        assert hook.segments.labels.shape[1] == value.shape[1]

    other = []
    with torch.no_grad():
        expected = tiny_model(observation, noise).chunk
        alone = tiny_model(inner, noise).chunk
        actions = tiny_model.run_with_hooks(observation, [(EXPERT, run_inside)], noise=noise)
    assert torch.equal(actions.chunk, expected) and torch.equal(other[0], alone)
    assert steps == [0, "inside", 0, 1, 2, 3, 1, 2, 3]


def test_stop_at_with_a_glob_caches_what_came_before(
    tiny_model: HookedVLA, observation: Observation, noise: Tensor
) -> None:
    _, cache = tiny_model.run_with_cache(observation, "vlm.*.hook_resid_post", noise=noise, stop_at=RESID)
    assert list(cache) == ["vlm.blocks.0.hook_resid_post", RESID]


def test_prepared_inputs_give_the_same_actions(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    inputs = tiny_model.prepare(observation)
    assert inputs.raw and torch.equal(tiny_model(inputs, noise).chunk, tiny_model(observation, noise).chunk)
    assert not inputs.rows([0]).rows([0]).images.shape[0] > 1


def test_changing_dtype_keeps_the_float32_islands(observation: Observation, noise: Tensor) -> None:
    model = HookedVLA.from_spec("smolvla", size="tiny")
    loaded = HookedVLA.from_spec("smolvla", size="tiny", dtype="bfloat16")
    before = model.net.expert.action_in_proj.weight.clone()
    model.to(torch.bfloat16)
    assert model.net.vlm.embed.weight.dtype == torch.bfloat16
    assert torch.equal(model.net.expert.action_in_proj.weight, before)
    assert torch.equal(model(observation, noise).chunk, loaded(observation, noise).chunk)
    with pytest.raises(ValueError, match="floating-point torch dtype or its name, got 'int32'"):
        HookedVLA.from_spec("smolvla", size="tiny", dtype="int32")


def test_queued_actions_are_for_one_batch_size(tiny_model: HookedVLA, noise: Tensor) -> None:
    tiny_model.select_action(make_observation(), noise)
    with pytest.raises(ValueError, match="queued actions are for 2 rows, the batch has 3"):
        tiny_model.select_action(make_observation(batch=3))
    tiny_model.reset()
    assert tiny_model.select_action(make_observation(batch=3)).shape == (3, 4)


def test_segments_live_where_the_model_does(tiny_model: HookedVLA, observation: Observation) -> None:
    segments = tiny_model.segments(tiny_model.prepare(observation))
    assert {each.labels.device for each in segments.values()} == {tiny_model.device}
