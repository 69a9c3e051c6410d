"""Path patching: all edges of a sender together are its patch, edges that lead nowhere do nothing."""

import fnmatch
from dataclasses import replace

import pytest
import torch
from public_checkpoints import make_observation, read_golden
from tolerance import assert_close
from torch import Tensor

from hooked_vla import HookedVLA
from hooked_vla.analysis.patching import activation_patching
from hooked_vla.analysis.path_patching import path_patching, reading_points, writing_points

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

MODELS = ["act", "groot_n15", "openvla", "pi05", "smolvla", "xvla"]
NOISE = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))


def weighted(edited: Tensor, base: Tensor, donor: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, edited[0].numel(), dtype=torch.float64).cos()
    # row by row: a product of matrices rounds a row by how many others there are
    return torch.stack([(row * weights).sum() for row in edited.flatten(1).double()])


@pytest.fixture(scope="module", params=MODELS)
def pair(request) -> tuple[HookedVLA, object, object, dict]:
    golden = read_golden(request.param)
    model = HookedVLA.from_pretrained(golden.folder).requires_grad_(False)
    clean = model.prepare(golden.batch).rows([0])
    noise = [golden.noise] if isinstance(golden.noise, Tensor) else golden.noise
    read = "vlm.hook_logits" if "vlm.hook_logits" in model.points else None
    given = {"metric": weighted, "noise": [draw[:1] for draw in noise], "read": read}
    return model, clean, replace(clean, images=clean.images.flip(-1)), given


def values(result, column: str = "value") -> Tensor:
    return torch.tensor(result.table[column].tolist(), dtype=torch.float64)


def test_paths_to_all_readers_together_are_the_patch_itself(pair) -> None:
    model, clean, corrupted, given = pair
    way = "encoder" if "encoder.hook_tokens" in model.points else "vlm"
    senders = [f"{way}.blocks.0.hook_resid_post", fnmatch.filter(model.points, f"{way}.blocks.0.hook_mlp_out")[0]]
    patched = activation_patching(model, clean, corrupted, senders, [None], **given)
    found = path_patching(model, clean, corrupted, senders, {"all": reading_points(model)}, [None], **given)
    assert found.table["site"].tolist() == patched.table["site"].tolist()
    assert patched.table["effect"].abs().min() > 1e-6
    assert_close(values(found), values(patched))


def test_paths_that_lead_nowhere_have_no_effect(pair) -> None:
    """The receiver comes before the sender."""
    model, clean, corrupted, given = pair
    way = "encoder" if "encoder.hook_tokens" in model.points else "vlm"
    last = max(int(name.split(".")[2]) for name in fnmatch.filter(model.points, f"{way}.blocks.*.hook_mlp_out"))
    sender, before = f"{way}.blocks.{last}.hook_resid_pre", f"{way}.blocks.0.attn.hook_v"
    found = path_patching(model, clean, corrupted, [sender], {"before": before}, [None], **given)
    assert (found.table["effect"] == 0).all()


def test_an_edge_is_what_its_three_runs_say(tiny_model: HookedVLA) -> None:
    """By hand: the sender patched with all writes behind it frozen; then what the receiver saw, in a plain run."""
    clean, corrupted = (make_observation(1, seed, ["lift the red block"]) for seed in (0, 3))
    sender, receiver = "vlm.blocks.0.hook_mlp_out", "vlm.blocks.2.attn.hook_v"
    result = path_patching(tiny_model, clean, corrupted, [sender], {"v": receiver}, [None], weighted, noise=NOISE)
    with torch.no_grad():
        _, donor = tiny_model.run_with_cache(clean, [sender], noise=NOISE)
        _, base = tiny_model.run_with_cache(corrupted, writing_points(tiny_model), noise=NOISE)
        frozen = [f"vlm.blocks.1.hook_{each}_out" for each in ("attn", "mlp")]
        hooks = [(sender, lambda value, hook: donor[sender] * 1)]
        hooks += [(name, lambda value, hook: base[hook.name] * 1) for name in frozen]
        with tiny_model.hooks(hooks):
            _, seen = tiny_model.run_with_cache(corrupted, [receiver], noise=NOISE)
        actions = tiny_model.run_with_hooks(
            corrupted, [(receiver, lambda value, hook: seen[receiver] * 1)], noise=NOISE
        )
    assert_close(values(result), weighted(actions.normalized, actions.normalized, actions.normalized))
    assert result.table["effect"].abs().min() > 1e-5


def test_edges_go_across_pathways_and_denoise_steps(tiny_model: HookedVLA) -> None:
    """What one block of the vlm says to the expert's block through its keys and values, and to nobody else."""
    clean, corrupted = (make_observation(1, seed, ["lift the red block"]) for seed in (0, 3))
    sender = "vlm.blocks.1.hook_resid_post"
    groups = {
        "expert 2": ["expert.blocks.2.attn.hook_prefix_k", "expert.blocks.2.attn.hook_prefix_v"],
        "expert 0": ["expert.blocks.0.attn.hook_prefix_k", "expert.blocks.0.attn.hook_prefix_v"],
        "vlm 2": ["vlm.blocks.2.attn.hook_k", "vlm.blocks.2.attn.hook_v"],
    }
    result = path_patching(tiny_model, clean, corrupted, [sender], groups, ["state", "image:*"], weighted, noise=NOISE)
    by = {(row.receiver, row.segment): row.effect for row in result.table.itertuples()}
    assert by["expert 0", "state"] == pytest.approx(0, abs=1e-6), "block 0 reads what was there before the sender"
    assert abs(by["expert 2", "state"]) > 1e-5
    # the vlm's own block reads the same keys and values, and hands them to the expert
    assert by["vlm 2", "state"] != pytest.approx(by["expert 2", "state"], abs=1e-7)
    assert [each.get_text() for each in result.figure("receiver").axes[0].get_xticklabels()] == list(groups)


def test_receivers_are_checked(tiny_model: HookedVLA) -> None:
    obs = make_observation(1)
    with pytest.raises(KeyError, match="hook_w"):
        path_patching(tiny_model, obs, obs, ["vlm.blocks.0.hook_mlp_out"], {"w": "vlm.hook_w"}, noise=NOISE)
    golden = read_golden("xvla")
    model = HookedVLA.from_pretrained(golden.folder)
    with pytest.raises(ValueError, match="receiver 'places': all rows of a batch share"):
        path_patching(
            model, golden.batch, golden.batch, ["vlm.blocks.0.hook_mlp_out"], {"places": "vlm.hook_pos_embed"},
            noise=golden.noise,
        )  # fmt: skip
