"""Edits on a model: where and when they act, what `set` changes, what is refused, and that nothing stays behind."""

import warnings

import pytest
import torch
from edited_model import BANK, BASIS, EXPERT, SAE, SITE, SOURCE, TOPK, D, V, randn, segment, value
from public_checkpoints import make_observation
from test_edits import make_sae
from tolerance import assert_close
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla import HookedVLA
from hooked_vla.interventions import (
    Ablate,
    Add,
    AddRelative,
    Clamp,
    CutSetWarning,
    DeadEndWarning,
    EditSet,
    Overwrite,
    Patch,
    ProjectOut,
    SAEFeatureEdit,
    SAEReconstruct,
    Scale,
    SubspacePatch,
)


@pytest.fixture(scope="module")
def tiny() -> HookedVLA:
    return HookedVLA.from_spec("smolvla", "tiny").requires_grad_(False)


def test_edits_act_in_their_order(tiny: HookedVLA) -> None:
    x, twice, more = value(tiny), Scale(SITE, 2.0), Add(SITE, V, 1.0)
    assert_close(value(tiny, twice, more), 2 * x + V)
    assert_close(value(tiny, more, twice), 2 * (x + V))


def test_rows_have_edits_of_their_own(tiny: HookedVLA) -> None:
    """A list for each row is what each row would be alone; edits of one kind then run as one."""
    obs, sets = make_observation(3), [[Add(SITE, V, 2.0)], [], [Scale(SITE, 0.5), Add(SITE, BANK[0], 1.0)]]
    with tiny.edits(sets) as edits:
        _, cache = tiny.run_with_cache(obs, SITE, stop_at=SITE)
    assert [edit.rows for edit in edits] == [(0,), (2,), (2,)]
    for row, own in enumerate(sets):
        _, alone = tiny.run_with_cache(obs, SITE, stop_at=SITE, edits=own)
        assert torch.equal(cache[SITE][row], alone[SITE][row])


@pytest.mark.parametrize(
    "make",
    [
        lambda i: Add(SITE, BANK[i], float(i)),
        lambda i: AddRelative(SITE, BANK[i], i / 4),
        lambda i: Scale(SITE, float(i)),
        lambda i: Clamp(SITE, -i / 4),
        lambda i: Patch(SITE, BANK[i]) if i else Ablate(SITE, "zero"),
        lambda i: Patch(SITE, BANK[i], i / 2),
        lambda i: SubspacePatch(SITE, BANK[i], BASIS, i / 2),
        lambda i: ProjectOut(SITE, BASIS, i / 2, BANK[i]),
        lambda i: SAEFeatureEdit(SITE, SAE, [i, 5], shift=i / 2),
        lambda i: SAEFeatureEdit(SITE, SAE, [i, 5], shift=i / 2, pool="segment"),
        lambda i: SAEFeatureEdit(SITE, TOPK, [i, 5], shift=i / 2),
        lambda i: SAEReconstruct(SITE, SAE),
    ],
)
def test_a_sweep_over_rows_is_one_operator(tiny: HookedVLA, make) -> None:
    obs, sweep = make_observation(3), [make(i) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutSetWarning)
        edits = EditSet(tiny, [[edit] for edit in sweep])
        assert len(edits._programs[SITE].operators) == 1
        _, cache = tiny.run_with_cache(obs, SITE, stop_at=SITE, edits=edits)
        for row, edit in enumerate(sweep):
            _, alone = tiny.run_with_cache(obs, SITE, stop_at=SITE, edits=[edit])
            assert_close(cache[SITE][row], alone[SITE][row])


def test_denoise_steps(tiny: HookedVLA) -> None:
    obs, noise = make_observation(), randn(2, 8, 8)
    _, plain = tiny.run_with_cache(obs, EXPERT, noise=noise)
    _, edited = tiny.run_with_cache(obs, EXPERT, noise=noise, edits=[Scale(EXPERT, 0.0, denoise=[1, 3])])
    assert [bool(step.any()) for step in edited[EXPERT]] == [True, False, True, False]
    assert torch.equal(edited[EXPERT][0], plain[EXPERT][0])
    source = randn(4, 2, 8, plain[EXPERT].shape[-1])
    for given, steps in ((source, None), (source, [0, 2]), (source[[0, 2]], [0, 2])):
        _, cache = tiny.run_with_cache(obs, EXPERT, noise=noise, edits=[Patch(EXPERT, given, denoise=steps)])
        for step in steps or range(4):
            assert torch.equal(cache[EXPERT][step], source[step])


def test_environment_steps(tiny: HookedVLA) -> None:
    x = value(tiny)
    with tiny.edits([Scale(SITE, 0.0, env=[range(2, 4), 6])]):
        with pytest.raises(ValueError, match=r"edit 'Scale' \(Scale\): env: the environment step is not known"):
            value(tiny)
        try:
            acts = []
            for tiny.run_state.env_step in range(8):
                now = value(tiny)
                acts.append(not now.any())
                assert acts[-1] or torch.equal(now, x)
        finally:
            tiny.run_state.env_step = None
    assert [i for i, act in enumerate(acts) if act] == [2, 3, 6]


def test_set_changes_what_the_next_pass_does(tiny: HookedVLA) -> None:
    x = value(tiny)
    edits = EditSet(tiny, [Add(SITE, V, 1.0, tokens="language", name="steer"), Patch(SITE, V, 0.0, name="patch")])
    language, state = segment(tiny, "language")[..., None], segment(tiny, "state")[..., None]
    with tiny.edits(edits):
        assert_close(value(tiny), x + language * V)
        edits.set("steer", strength=3.0, direction=BANK[0])
        assert_close(value(tiny), x + 3 * language * BANK[0])
        edits.set("steer", tokens="state")
        assert_close(value(tiny), x + 3 * state * BANK[0])
        edits.set("patch", strength=1.0, source=BANK[1])
        assert torch.equal(value(tiny), BANK[1].expand_as(x))
    assert edits["steer"].strength == 3 and "Add 3 × direction[64]" in str(edits)
    assert torch.equal(value(tiny), x)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("sterr", {"strength": 1.0}, KeyError, "no edit is named 'sterr'; nearest: steer"),
        ("steer", {"strenght": 1.0}, ValueError, "Add has no strenght; it has site, .*direction, strength"),
        ("steer", {"site": EXPERT}, ValueError, "site cannot change: make a new EditSet"),
        ("steer", {"denoise": 1}, ValueError, "denoise cannot change"),
        ("steer", {"tokens": None}, ValueError, "an edit of everything cannot become one of some tokens"),
        ("steer", {"direction": [1.0, 2.0]}, ValueError, r"direction is \[2\], but .* is 64 wide"),
        ("patch", {"source": SOURCE}, ValueError, r"table would be \[1, 78, 64\] in place of \[1, 1, 64\]"),
        ("patch", {"strength": None}, ValueError, "strength cannot be given or left out later"),
        ("sae", {"features": [1, 2]}, ValueError, r"\(SAEFeatureEdit\): features would be 2 in place of 1, all rows"),
        ("sae", {"sae": TOPK}, ValueError, "sae cannot change"),
    ],
)
def test_set_refuses_and_changes_nothing(tiny: HookedVLA, name: str, change: dict, error: type, message: str) -> None:
    edits = EditSet(
        tiny,
        [
            Add(SITE, V, 1.0, tokens="language", name="steer"),
            Patch(SITE, V, 0.5, name="patch"),
            SAEFeatureEdit(SITE, SAE, 1, name="sae"),
        ],
    )
    before, shown = value(tiny, *edits), str(edits)
    with pytest.raises(error, match=message):
        edits.set(name, **change)
    with tiny.edits(edits):
        assert torch.equal(value(tiny), before)
    assert str(edits) == shown


HEADS = "vlm.blocks.1.attn.hook_z"
PATTERN = "vlm.blocks.1.attn.hook_pattern"
WRONG = [
    (Scale("vlm.blocks.1.hook_resid_pots", 1.0), KeyError, "site: no hook point matches .*nearest: vlm"),
    (Add(SITE, randn(D + 1), 1.0), ValueError, r"direction is \[65\], but vlm.blocks.1.hook_resid_post is 64 wide"),
    (AddRelative(SITE, randn(2, D), 1.0), ValueError, r"direction is \[2, 64\], but"),
    (ProjectOut(SITE, randn(2, 3)), ValueError, r"basis is \[2, 3\], but .* is 64 wide"),
    (ProjectOut(SITE, torch.ones(2, D)), ValueError, "basis: its 2 rows are linearly dependent"),
    (ProjectOut(SITE, randn(D + 1, D)), ValueError, "basis has 65 rows, more than 64"),
    (Patch(SITE, randn(3, 4, 5, 6, 7)), ValueError, r"source is \[3, 4, 5, 6, 7\], but .* is \[batch seq d_model\]"),
    (Patch(SITE, randn(39, D + 1)), ValueError, r"source is \[39, 65\], but .* is \[batch seq d_model=64\]"),
    (Patch(SITE, randn(5, D)), ValueError, r"source has 5 tokens, but rows have \[39\] edited tokens of 39"),
    (Patch(SITE, randn(3, 39, D)), ValueError, "source has 3 rows, but 2 of 2 rows are edited"),
    (Patch(EXPERT, randn(3, 2, 8, 48)), ValueError, "source has 3 denoise steps, but the model has 4"),
    (Ablate(SITE, "resample", V), ValueError, r"source is \[64\]; it must be \[n 64\]"),
    (Overwrite(SITE, [1.0, 2.0]), ValueError, r"value is \[2\], but .* is 64 wide"),
    (Overwrite(SITE, [1.0, 2.0], channels=1), ValueError, r"value is \[2\] for 1 channels"),
    (Overwrite(SITE, 1.0, channels=D), ValueError, r"channels \[64\]: .* has 0..63"),
    (Overwrite(HEADS, 1.0, heads=9), ValueError, r"heads \[9\]: vlm.blocks.1.attn.hook_z has 0.."),
    (Overwrite(SITE, 1.0, heads=0), ValueError, "has no heads"),
    (Scale(SITE, 1.0, tokens="langauge"), ValueError, r"tokens: at .*no token segment 'langauge' in this stream"),
    (Scale(SITE, 1.0, positions=39), ValueError, r"positions \[39\]: vlm.blocks.1.hook_resid_post has places 0..38"),
    (Scale(SITE, 1.0, rows=2), ValueError, r"rows \[2\]: the batch has rows 0..1"),
    (Scale(SITE, 1.0, keys="language"), ValueError, "is no attention pattern"),
    (Scale(SITE, 1.0, denoise=0), ValueError, "denoise: vlm.blocks.1.hook_resid_post runs once per chunk"),
    (Scale(EXPERT, 1.0, denoise=4), ValueError, r"denoise steps \[4\]: this model's are 0..3"),
    (Scale("vision.hook_pos_embed", 1.0, rows=0), ValueError, "rows: all rows share vision.hook_pos_embed"),
    (Scale("expert.hook_time", 1.0, tokens="action"), ValueError, r"tokens \['action'\]: expert.hook_time .* has no"),
    (Scale(SITE, 1.0, tokens="language", positions=0), ValueError, "reaches no value at .*tokens language, pos"),
    (Add(PATTERN, V, 1.0), ValueError, "has no fixed width that it could fit"),
    (SAEReconstruct(SITE, make_sae(8, 32)), ValueError, "sae is for tokens 32 wide, but .* is 64 wide"),
    (SAEFeatureEdit(SITE, make_sae(80, D, k=2), range(70)), ValueError, "features: at most 64 of a TopK autoencoder"),
]  # fmt: skip


@unchecked_shapes()
@pytest.mark.parametrize(("edit", "error", "message"), WRONG)
def test_errors_name_the_argument_before_anything_runs(tiny: HookedVLA, edit, error: type, message: str) -> None:
    seen = []
    look = [("*", lambda value, hook: seen.append(hook.name))]
    with warnings.catch_warnings(), tiny.hooks(look), pytest.raises(error, match=message) as caught:
        warnings.simplefilter("ignore")
        tiny(make_observation(), edits=[edit])
    assert edit.kind in str(caught.value) and not seen
    # and nothing stays behind
    assert not any(point.listeners for point in tiny.points.values()) and not tiny.before_run


def test_names_and_kinds_are_checked(tiny: HookedVLA) -> None:
    with pytest.raises(ValueError, match=r"edits need different names, or none; used more than once: \['a'\]"):
        EditSet(tiny, [Scale(SITE, 1.0, name="a"), Scale(SITE, 2.0, name="a")])
    assert [edit.name for edit in EditSet(tiny, [Scale(SITE, 1.0), Scale(SITE, 2.0), Clamp(SITE, 0.0)])] == [
        "Scale", "Scale-2", "Clamp",
    ]  # fmt: skip
    edits = EditSet(tiny, [])
    with tiny.edits(edits), pytest.raises(RuntimeError, match="attached already"), tiny.edits(edits):
        pass
    other = HookedVLA.from_spec("smolvla", "tiny")
    with pytest.raises(ValueError, match="made for another model"), other.edits(edits):
        pass


def test_sources_stand_by_place_or_in_the_order_of_the_edited_tokens(tiny: HookedVLA) -> None:
    x, language = value(tiny), segment(tiny, "language")
    lengths = language.sum(1).tolist()
    assert lengths[0] != lengths[1]
    with pytest.raises(ValueError, match=rf"source has 3 tokens, but rows have \[{min(lengths)}, {max(lengths)}\]"):
        value(tiny, Patch(SITE, randn(3, D), tokens="language"))
    # one row's words into the other's first ones
    words = value(tiny, seed=4)[1][language[1]]
    first = language[0].nonzero().flatten()[: len(words)].tolist()
    edited = value(tiny, Patch(SITE, words, rows=0, positions=first))
    assert torch.equal(edited[0, first], words) and torch.equal(edited[1], x[1])
    # the whole stream's source, taken where it is edited
    assert torch.equal(value(tiny, Patch(SITE, SOURCE, tokens="language")), x.where(~language[..., None], SOURCE))
    # sources of the edited rows alone
    assert torch.equal(value(tiny, Patch(SITE, SOURCE[1:], rows=1))[1], SOURCE[1])


def test_heads_and_keys(tiny: HookedVLA) -> None:
    z = value(tiny, site=HEADS)
    edited = value(tiny, Ablate(HEADS, "zero", heads=1, tokens="language"), site=HEADS)
    language = segment(tiny, "language")
    assert not edited[:, :, 1][language].any() and torch.equal(edited[:, :, 0], z[:, :, 0])
    pattern = value(tiny, site=PATTERN)
    edited = value(tiny, Overwrite(PATTERN, 0.0, tokens="state", keys="image:*", heads=0), site=PATTERN)
    state, image = segment(tiny, "state"), segment(tiny, "image:*")
    here = torch.zeros_like(pattern, dtype=torch.bool)
    here[:, 0] = state[:, :, None] & image[:, None]
    assert torch.equal(edited, pattern.masked_fill(here, 0)) and bool((pattern[here] != 0).any())
    # a pattern from elsewhere
    other = value(tiny, site=PATTERN, seed=3)
    assert torch.equal(value(tiny, Patch(PATTERN, other, heads=1), site=PATTERN)[:, 1], other[:, 1])


def test_segments_of_other_streams(tiny: HookedVLA) -> None:
    """Rows of vision are camera images; a row of the batch has several."""
    site = "vision.blocks.0.hook_resid_post"
    x = value(tiny, site=site)
    edited = value(tiny, Scale(site, 0.0, tokens="image:wrist", rows=1), site=site)
    assert [bool((a == b).all()) for a, b in zip(edited, x, strict=True)] == [True, True, True, False]
    assert not edited[3].any()


def test_a_hook_may_run_the_model(tiny: HookedVLA) -> None:
    """The inner run has other tokens; the outer one's are found again."""
    obs, inner, noise = make_observation(), make_observation(1, instruction=["lift"]), randn(2, 8, 8)
    edit = Scale("vlm.blocks.*.hook_resid_post", 0.0, tokens="language")
    expected = tiny(obs, noise, edits=[edit]).chunk
    with tiny.edits([edit]):
        hook = tiny.add_hook("vlm.blocks.0.hook_resid_post", lambda value, hook: run_inside())

        def run_inside() -> None:
            hook.remove()
            tiny(inner)

        assert torch.equal(tiny(obs, noise).chunk, expected)
        assert not hook.fired or hook.attached


def test_edits_follow_a_model_that_moves() -> None:
    model = HookedVLA.from_spec("smolvla", "tiny").requires_grad_(False)
    edits = EditSet(model, [Add(SITE, V, 1.0)])
    model.to(torch.bfloat16)
    with model.edits(edits):
        edited = value(model)
    assert edited.dtype == torch.bfloat16
    assert_close(edited, value(model) + V, torch.bfloat16)


def test_nothing_stays_attached_after_an_error(tiny: HookedVLA) -> None:
    with pytest.raises(ZeroDivisionError), tiny.edits([Scale(SITE, 0.0)]):
        tiny(make_observation())
        raise ZeroDivisionError
    assert not any(point.listeners for point in tiny.points.values()) and not tiny.before_run


def test_an_edit_that_comes_upon_no_value(tiny: HookedVLA) -> None:
    """With ready-made vision features the tower does not run."""
    from dataclasses import replace

    inputs = tiny.prepare(make_observation())
    ready = replace(inputs, features=tiny.net.vision_features(inputs), images=None)
    with (
        pytest.raises(RuntimeError, match=r"edits \['Scale'\] came upon no value"),
        tiny.edits([Scale("vision.blocks.0.hook_resid_post", 0.0)]),
    ):
        tiny(ready)


def test_every_entry_point_takes_edits(tiny: HookedVLA) -> None:
    obs, noise, edits = make_observation(), randn(2, 8, 8), [Scale(SITE, 0.0)]
    expected = tiny(obs, noise, edits=edits).chunk
    assert not torch.equal(expected, tiny(obs, noise).chunk)
    assert torch.equal(tiny.predict_action_chunk(obs, noise, edits=edits), expected)
    assert torch.equal(tiny.run_with_hooks(obs, noise=noise, edits=edits).chunk, expected)
    assert torch.equal(tiny.run_with_cache(obs, SITE, noise=noise, edits=edits)[0].chunk, expected)
    tiny.reset()
    assert torch.equal(tiny.select_action(obs, noise, edits=edits), expected[:, 0])
    tiny.reset()


def test_gradients_pass_through(tiny: HookedVLA) -> None:
    """Of the value that is edited, outside of what a patch replaces."""
    seen = {}

    def watch(value: Tensor, hook) -> Tensor:
        seen["x"] = value.detach().requires_grad_()
        return seen["x"]

    with tiny.hooks([(SITE, watch)]), tiny.edits([Patch(SITE, V, tokens="language"), Scale(SITE, 2.0)]):
        chunk = tiny(make_observation(), randn(2, 8, 8)).chunk
        [gradient] = torch.autograd.grad(chunk.sum(), seen["x"])
    language = segment(tiny, "language")
    assert not gradient[language].any() and gradient[~language].any()


def test_dead_ends_are_warned_of(tiny: HookedVLA) -> None:
    with pytest.warns(DeadEndWarning, match="edit 'Scale' is a dead end: no action depends on vlm.ln_final"):
        EditSet(tiny, [Scale("vlm.ln_final.hook_normalized", 2.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EditSet(tiny, [Scale(SITE, 2.0)])


@pytest.mark.parametrize("where", ["rows", "positions"])
def test_what_a_kernel_refuses_is_told_as_the_edits(tiny: HookedVLA, where: str) -> None:
    broken = Patch(SITE, torch.full((D,), 3e38), name="break", **{where: 1})
    worse = Scale(SITE, 100.0, name="overflow")
    with pytest.raises(ValueError, match=rf"^edit 'steer' \(Add\) at {SITE}: lowrank_edit: x must hold finite values"):
        value(tiny, broken, worse, Add(SITE, V, 1.0, name="steer"))
