"""Injection into forward passes: a run into itself changes nothing; whatever does not fit is an error, not a skip."""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from public_checkpoints import make_observation, read_golden
from torch import Tensor

from hooked_vla import HookedVLA, list_models
from hooked_vla.hooks.cache import ROW_AXES
from hooked_vla.interventions import Patch, Window
from hooked_vla.interventions.injection import Donor, ExhaustedError, Injection, Injector
from hooked_vla.interventions.injection_reach import find_reach
from hooked_vla.interventions.injection_sites import (
    choose_layers,
    choose_sites,
    layer_sites,
    prefix_sites,
    residual_sites,
    stream_sites,
)

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

VLM, EXPERT = "vlm.blocks.1.hook_resid_post", "expert.blocks.0.hook_resid_post"
KEYS = "expert.blocks.1.cross_attn.hook_prefix_k"
LEAVES = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_tokens", "hook_k",
    "hook_v", "hook_prefix_k", "hook_prefix_v", "hook_z", "hook_velocity", "hook_noisy_actions",
)  # fmt: skip


@contextmanager
def injected(model: HookedVLA, injection: Injection, donors: Sequence[Donor | None], env_step: int = 0):
    """The model at an environment step, under an injection."""
    model.run_state.env_step = env_step
    try:
        with model.hooks(Injector(injection, donors).requests()):
            yield
    finally:
        model.run_state.env_step = None


@torch.no_grad()
def run(model: HookedVLA, obs, noise: Tensor, injection: Injection, donors: Sequence[Donor | None], env_step: int = 0):
    with injected(model, injection, donors, env_step):
        return model(obs, noise).normalized


@torch.no_grad()
def donors_of(model: HookedVLA, obs, noise: Tensor, sites, steps: Sequence[int] = (0,)) -> list[Donor]:
    """Both rows of a run, as donors that held the same at all environment steps."""
    _, cache = model.run_with_cache(obs, sites, noise)
    return [Donor.from_caches(f"row {row}", dict.fromkeys(steps, cache), row) for row in range(cache.batch_size)]


@pytest.fixture
def other() -> object:
    return make_observation(seed=3, instruction=["take the tray to the block on", "lift"])


@torch.no_grad()
@pytest.mark.parametrize("family", list_models())
def test_a_run_injected_into_itself_keeps_every_bit(family: str) -> None:
    golden = read_golden(family)
    model = HookedVLA.from_pretrained(golden.folder).requires_grad_(False)
    sites = [name for name, point in model.points.items()
             if name.rpartition(".")[2] in LEAVES and point.axes[0] in ROW_AXES]  # fmt: skip
    assert any(model.hook_points[site].reaches_action for site in sites)
    plain, cache = model.run_with_cache(golden.batch, sites, golden.noise)
    assert plain is not None
    donors = [Donor.from_caches("itself", {8: cache}, row) for row in range(cache.batch_size)]
    with injected(model, Injection(sites, "error"), donors, 8):
        again = model(golden.batch, golden.noise)
    assert torch.equal(again.normalized, plain.normalized) and torch.equal(again.chunk, plain.chunk)
    # it does act: the first row's values arrive in all rows
    seen: set[str] = set()

    def arrived(value: Tensor, hook) -> None:
        held = donors[0].held[hook.name][8]
        given = held.value[held.index(hook.denoise_step)]
        assert torch.equal(value[-len(given) :], given), hook
        seen.add(hook.name)

    with injected(model, Injection(sites, "error"), donors[:1] * len(donors), 8), model.hooks([(sites, arrived)]):
        swapped = model(golden.batch, golden.noise).normalized
    assert torch.equal(swapped[0], plain.normalized[0]) and seen == set(sites)


def test_an_injection_is_a_patch_from_the_donor(tiny_model: HookedVLA, other, noise: Tensor) -> None:
    obs = make_observation()
    cases: list[tuple[str, dict[str, Any]]] = [
        (VLM, {}), (VLM, {"tokens": "image:*"}), (KEYS, {"tokens": ["image:agent", "state"]}),
        (EXPERT, {"denoise": [1, 3]}), (EXPERT, {"positions": [0, 5]}),
    ]  # fmt: skip
    for site, keywords in cases:
        donors = donors_of(tiny_model, other, noise, site)
        mine = run(tiny_model, obs, noise, Injection(site, "error", **keywords), [donors[0], None])
        with torch.no_grad():
            _, cache = tiny_model.run_with_cache(other, site, noise)
            patch = Patch(site, cache.rows(0)[site], rows=0, **keywords)
            patched = tiny_model(obs, noise, edits=[patch]).normalized
            plain = tiny_model(obs, noise).normalized
        assert torch.equal(mine, patched) and not torch.equal(mine[0], plain[0]) and torch.equal(mine[1], plain[1])


# What published code got wrong: each of these fails on it.


def test_windows_count_environment_steps_not_forward_calls(tiny_model: HookedVLA, other, noise: Tensor) -> None:
    """A window of 8 steps: a count of calls at the expert would be over within the first chunk."""
    obs, calls = make_observation(), []
    donors = donors_of(tiny_model, other, noise, EXPERT, (0, 4, 8, 12))
    plain = tiny_model(obs, noise).normalized
    injection = Injection(EXPERT, "error", env=Window(4, 12))

    def note(value: Tensor, hook) -> None:
        given = donors[0].held[EXPERT][0].value[hook.denoise_step]
        calls.append((hook.run.env_step, torch.equal(value[:1], given)))

    injector = Injector(injection, donors)
    with tiny_model.hooks([*injector.requests(), (EXPERT, note)]):
        for env_step in (0, 4, 8, 12):
            tiny_model.run_state.env_step = env_step
            actions = tiny_model(obs, noise).normalized
            assert torch.equal(actions, plain) == (env_step in (0, 12))
    tiny_model.run_state.env_step = None
    n = tiny_model.n_denoise_steps
    assert n > 1 and [step for step, put in calls if put] == [4] * n + [8] * n


def test_another_shape_is_an_error_with_site_and_shapes(tiny_model: HookedVLA, noise: Tensor) -> None:
    obs = make_observation()
    longer = make_observation(1, instruction=["put the red block on the tray and then push it away"])
    [donor] = donors_of(tiny_model, longer, noise[:1], VLM)
    here, there = (list(donors_of(tiny_model, each, n, VLM)[0].held[VLM][0].value.shape[1:])
                   for each, n in ((obs, noise), (longer, noise[:1])))  # fmt: skip
    assert here != there
    with pytest.raises(
        ValueError, match="injection: vlm.blocks.1.hook_resid_post.*is .*for a row of the target"
    ) as error:
        run(tiny_model, obs, noise, Injection(VLM, "error"), [donor, None])
    assert str(here) in str(error.value) and str(there) in str(error.value)
    narrow = Donor("narrow", {VLM: {0: replace(donor.held[VLM][0], value=donor.held[VLM][0].value[..., :5])}})
    with pytest.raises(ValueError, match=r"vlm.blocks.1.hook_resid_post.*, 5\] in the recording of narrow"):
        run(tiny_model, obs, noise, Injection(VLM, "error", tokens="image:*"), [narrow, None])
    half = Donor("half", {VLM: {0: replace(donor.held[VLM][0], value=donor.held[VLM][0].value.half())}})
    with pytest.raises(ValueError, match=r"is torch.float32 in the target, but torch.float16 in the recording of half"):
        run(tiny_model, obs, noise, Injection(VLM, "error", tokens="image:*"), [half, None])


def test_the_end_of_the_recording_is_never_silent(tiny_model: HookedVLA, other, noise: Tensor) -> None:
    obs, at = make_observation(), 12
    donors = donors_of(tiny_model, other, noise, EXPERT, (0, 4))
    plain = tiny_model(obs, noise).normalized
    with pytest.raises(ExhaustedError, match="injection: the recording of row 0 ends at env_step 4, .* goes on at 12"):
        run(tiny_model, obs, noise, Injection(EXPERT, "error"), donors, at)
    assert torch.equal(run(tiny_model, obs, noise, Injection(EXPERT, "stop"), donors, at), plain)
    held = run(tiny_model, obs, noise, Injection(EXPERT, "hold"), donors, at)
    assert torch.equal(held, run(tiny_model, obs, noise, Injection(EXPERT, "error"), donors, 4))
    assert not torch.equal(held, plain)
    with pytest.raises(ValueError, match="exhaustion must be one of stop, hold, error, got 'forget'"):
        Injection(EXPERT, "forget")
    with pytest.raises(TypeError, match="exhaustion"):
        Injection(EXPERT)  # pyright: ignore[reportCallIssue]


def test_a_donor_that_plans_at_other_steps_is_an_error(tiny_model: HookedVLA, other, noise: Tensor) -> None:
    donors = donors_of(tiny_model, other, noise, EXPERT, (0, 8))
    with pytest.raises(
        KeyError, match=r"was not recorded at env_step 4 of row 0; recorded: \[0, 8\]: donor and target"
    ):
        run(tiny_model, make_observation(), noise, Injection(EXPERT, "stop"), donors, 4)
    with pytest.raises(KeyError, match="vlm.blocks.1.hook_resid_post was not recorded of row 0; nearest"):
        run(tiny_model, make_observation(), noise, Injection(VLM, "stop"), donors, 0)
    with (
        pytest.raises(RuntimeError, match="the environment step is not known"),
        tiny_model.hooks(Injector(Injection(EXPERT, "stop"), donors).requests()),
    ):
        tiny_model(make_observation(), noise)


def test_a_donor_that_denoised_in_more_steps_is_an_error(
    tiny_model: HookedVLA, other, noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = tiny_model.n_denoise_steps
    donors = donors_of(tiny_model, other, noise, EXPERT, (0,))
    monkeypatch.setattr(tiny_model.net.head, "n_steps", n // 2)
    assert tiny_model.n_denoise_steps == n // 2
    with pytest.raises(ValueError, match=f"recorded at denoise step {n - 1}, but the target has {n // 2}"):
        run(tiny_model, make_observation(), noise, Injection(EXPERT, "stop"), donors, 0)


def test_rows_that_are_over_need_no_donor(tiny_model: HookedVLA, other, noise: Tensor) -> None:
    """An episode that is over keeps its row: that its donor has ended too is no error."""
    obs, donors = make_observation(), donors_of(tiny_model, other, noise, EXPERT, (0, 4))
    longer = donors_of(tiny_model, other, noise, EXPERT, (0, 4, 8))
    tiny_model.run_state.in_use = [False, True]
    try:
        actions = run(tiny_model, obs, noise, Injection(EXPERT, "error"), [donors[0], longer[1]], 8)
    finally:
        tiny_model.run_state.in_use = None
    plain = tiny_model(obs, noise).normalized
    assert torch.equal(actions[0], plain[0]) and not torch.equal(actions[1], plain[1])


# Tokens.


def language(model: HookedVLA, obs, site: str, noise: Tensor) -> list[list[int]]:
    _, cache = model.run_with_cache(obs, site, noise)
    return [each.tolist() for each in cache.segments["vlm"].positions("language")]


@torch.no_grad()
def test_tokens_of_unequal_prompts_are_mapped_or_refused(tiny_model: HookedVLA, noise: Tensor) -> None:
    obs = make_observation(instruction=["lift", "lift"])
    source = make_observation(seed=3, instruction=["put the red block on the tray", "put it down"])
    donors = donors_of(tiny_model, source, noise, VLM)
    theirs, ours = language(tiny_model, source, VLM, noise)[0], language(tiny_model, obs, VLM, noise)[0]
    assert len(theirs) > len(ours) >= 3
    with pytest.raises(ValueError, match=rf"'language' has {len(theirs)} tokens in the recording, but {len(ours)} in"):
        run(tiny_model, obs, noise, Injection(VLM, "error", tokens="language"), [donors[0], None])
    for align, expected in (
        ("start", dict(zip(ours, theirs, strict=False))),
        ({"language": [(2, 0), (0, 1)]}, {ours[0]: theirs[2], ours[1]: theirs[0]}),
    ):
        injection = Injection(VLM, "error", tokens="language", align=align)
        _, before = tiny_model.run_with_cache(obs, VLM, noise)
        with injected(tiny_model, injection, [donors[0], None]):
            _, after = tiny_model.run_with_cache(obs, VLM, noise)
        held, plain = donors[0].held[VLM][0].value[0, 0], before[VLM]
        for place in range(plain.shape[1]):
            given = held[expected[place]] if place in expected else plain[0, place]
            assert torch.equal(after[VLM][0, place], given), place
        assert torch.equal(after[VLM][1], plain[1])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"tokens": "language", "align": "middle"}, "align must be 'equal', 'start', or pairs"),
        ({"align": "start"}, "align pairs the tokens of segments: say which"),
        ({"tokens": "language", "align": {"language": [(0, 1), (2, 1)]}}, "gives a token of the target twice"),
        ({"tokens": "language", "align": {"language": [(0, -1)]}}, "counted from 0"),
        ({"tokens": ""}, "tokens is empty"),
        ({"env": []}, "env is empty"),
    ],
)
def test_what_makes_no_sense_is_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Injection(VLM, "error", **keywords)


def test_places_that_are_not_there_are_named(tiny_model: HookedVLA, other, noise: Tensor) -> None:
    obs = make_observation()
    donors = donors_of(tiny_model, other, noise, [VLM, EXPERT, "vlm.hook_embed_state", "head.hook_actions"])
    cases: list[tuple[str, dict[str, Any], str]] = [
        (VLM, {"tokens": "words"}, "injection: vlm.blocks.1.hook_resid_post: no token segment 'words'"),
        (VLM, {"positions": 10_000}, r"positions \[10000\]: it has places 0\.\."),
        (VLM, {"denoise": 1}, "denoise: vlm.blocks.1.hook_resid_post runs once per chunk"),
        (VLM, {"tokens": "language", "positions": 0}, "nothing is left to inject at vlm.blocks.1.hook_resid_post"),
        ("head.hook_actions", {"tokens": "action"}, "head.hook_actions has no token segments"),
        (VLM, {"tokens": "language", "align": {"language": [(99, 0)]}}, r"align pairs \[\(99, 0\)\] of 'language'"),
    ]
    for site, keywords, message in cases:
        with pytest.raises(ValueError, match=message):
            run(tiny_model, obs, noise, Injection(site, "error", **keywords), [donors[0], None])
    with pytest.raises(ValueError, match="no row has a donor"):
        Injector(Injection(VLM, "error"), [None, None])


def test_an_injection_says_what_it_is() -> None:
    injection = Injection([VLM, EXPERT], "hold", tokens="language", env=range(4, 8), align={"language": [(0, 1)]})
    assert injection.describe() == {
        "sites": [VLM, EXPERT], "exhaustion": "hold", "tokens": ["language"], "positions": None, "denoise": None,
        "align": {"language": [[0, 1]]}, "env": [[4, 8]],
    }  # fmt: skip


# Sites.


def test_sites_are_chosen_by_pathway_kind_and_depth(tiny_model: HookedVLA) -> None:
    n = len(layer_sites(tiny_model, "vlm"))
    assert n > 1 and layer_sites(tiny_model, "vlm")[0] == "vlm.blocks.0.hook_resid_post"
    assert stream_sites(tiny_model, "expert")[0] == "expert.blocks.0.hook_resid_pre"
    assert choose_sites(tiny_model, "vlm.mlp_out:last") == [f"vlm.blocks.{n - 1}.hook_mlp_out"]
    assert choose_sites(tiny_model, "vlm:1+vlm.attn_out:first") == [VLM, "vlm.blocks.0.hook_attn_out"]
    assert choose_sites(tiny_model, "expert") == stream_sites(tiny_model, "expert")
    assert choose_sites(tiny_model, "prefix_kv") == prefix_sites(tiny_model)
    assert {name.rpartition(".")[2] for name in prefix_sites(tiny_model)} == {"hook_prefix_k", "hook_prefix_v"}
    assert residual_sites(tiny_model) == [*stream_sites(tiny_model, "vlm"), *stream_sites(tiny_model, "expert")]
    for text, message in (("vlm.keys:all", "unknown kind of site 'keys'"), ("adapter", "pathway 'adapter'; pathways:"),
                          ("vlm:9", "there is no layer 9"), ("vlm:top", "layers must be one of")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            choose_sites(tiny_model, text)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 12, 17, 32])
def test_thirds_cover_all_layers_once_and_in_order(n: int) -> None:
    layers = list(range(n))
    thirds = [choose_layers(layers, third) for third in ("early", "mid", "late")]
    assert thirds[0][0] == 0 and thirds[2][-1] == n - 1
    if n >= 3:
        assert [each for third in thirds for each in third] == layers
        assert len(thirds[0]) == len(thirds[2]) <= len(thirds[1])
    assert choose_layers(layers, "middle") == [n // 2] and choose_layers(layers, "all") == layers


# What an injection can show.


@pytest.mark.parametrize(
    ("text", "label", "cut", "dead"),
    [
        ("expert:last", "replay", True, False),
        ("vlm", "replay", True, False),
        ("expert", "replay", True, False),
        ("prefix_kv", "replay", True, False),
        ("vlm:last", "dead end", False, True),
        ("vlm:0", "open", False, False),
        ("expert:0", "open", False, False),
    ],
)
def test_replay_and_dead_ends_are_told_by_names_and_confirmed_by_running(
    tiny_model: HookedVLA, noise: Tensor, text: str, label: str, cut: bool, dead: bool
) -> None:
    first, second, third = (make_observation(1, seed, [words]) for seed, words in
                            ((0, "put the red block"), (3, "lift one two tray"), (7, "push the one tray")))  # fmt: skip
    sites = choose_sites(tiny_model, text)
    [donor] = donors_of(tiny_model, third, noise[1:], sites)
    reach = find_reach(tiny_model, Injection(sites, "error"), donor, first, second, noise[:1], 0)
    assert reach.label == label and (reach.cut is not None) == cut and reach.dead_end == dead and reach.agrees


@pytest.mark.parametrize(
    ("text", "label", "cuts"), [("vlm", "cut set", False), ("expert", "replay", True), ("vlm:last", "dead end", False)]
)
def test_what_cuts_every_scene_may_still_tell_prompts_apart(
    tiny_model: HookedVLA, noise: Tensor, monkeypatch: pytest.MonkeyPatch, text: str, label: str, cuts: bool
) -> None:
    """No injection reaches the mask that hides padding: a longer prompt is another one to those who read the vlm."""
    said = ((0, "put the red block"), (3, "lift one two tray"), (7, "push the one tray"),
            (0, "put the red block on the one tray"))  # fmt: skip
    tokenizer = tiny_model.processor.tokenizer
    # prompts of all lengths in one shape
    monkeypatch.setattr(tokenizer, "features", replace(tokenizer.features, pad_text="max_length"))
    first, second, third, longer = (
        tiny_model.prepare(make_observation(1, seed, [words]), None) for seed, words in said
    )
    sites = choose_sites(tiny_model, text)
    [donor] = donors_of(tiny_model, third, noise[1:], sites)
    reach = find_reach(tiny_model, Injection(sites, "error"), donor, first, second, noise[:1], 0, longer)
    assert reach.label == label and reach.cuts_prompt == cuts and reach.agrees


def test_part_of_a_cut_set_is_not_replay(tiny_model: HookedVLA, noise: Tensor) -> None:
    first, second = (make_observation(1, seed, ["put the red block"]) for seed in (0, 3))
    sites = choose_sites(tiny_model, "vlm")
    [donor] = donors_of(tiny_model, make_observation(1, 7, ["put the red block"]), noise[:1], sites)
    part = find_reach(tiny_model, Injection(sites, "error", tokens="image:*"), donor, first, second, noise[:1], 0)
    assert part.label == "open" and part.cut is None and part.agrees
    # all segments one by one are the whole
    names = ["image:*", "language", "state", "pad"]
    every = find_reach(tiny_model, Injection(sites, "error", tokens=names), donor, first, second, noise[:1], 0)
    assert every.label == "replay"
    with pytest.raises(ValueError, match="lead to the same actions without injection"):
        find_reach(tiny_model, Injection(sites, "error"), donor, first, first, noise[:1], 0)
    with pytest.raises(ValueError, match="does nothing at env_step 0"):
        find_reach(tiny_model, Injection(sites, "error", env=Window(4)), donor, first, second, noise[:1], 0)
