"""Ablations of blocks, heads and neurons: they do what they say, with means and tokens of the inputs they are given."""

import pytest
import torch
from public_checkpoints import make_observation, read_golden
from tolerance import assert_close
from torch import Tensor

from hooked_vla import HookedVLA
from hooked_vla.analysis.ablation import (
    ablate_block,
    ablate_heads,
    ablate_neurons,
    list_blocks,
    mean_activations,
    reaches_action,
    sample_tokens,
    skips_exactly,
)

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

NOISE = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))
VLM, EXPERT = "vlm.blocks.1.hook_resid_post", "expert.blocks.2.hook_resid_post"


def cached(model: HookedVLA, obs: object, names: list[str], noise: object = NOISE, edits: object = ()):
    with torch.no_grad():
        return model.run_with_cache(obs, names, noise=noise, edits=edits)[1]


def runs(n: int = 2) -> list[tuple[object, Tensor]]:
    texts = ["lift the red block", "push it"]
    return [(make_observation(2, seed, texts), NOISE + seed) for seed in range(n)]


@pytest.mark.parametrize("name", ["smolvla", "pi05", "xvla", "groot_n15", "groot_n17", "openvla", "act"])
def test_a_skipped_block_hands_on_what_it_got(name: str) -> None:
    golden = read_golden(name)
    model = HookedVLA.from_pretrained(golden.folder).requires_grad_(False)
    blocks = [block for block in list_blocks(model) if not block.startswith("vision.stages")]
    assert {block.split(".")[0] for block in blocks} >= {"expert"} or name == "openvla"
    exact = [block for block in blocks if skips_exactly(model, block)]
    assert exact or name == "act"
    for block in {each.split(".")[0]: each for each in exact}.values():
        ends = [f"{block}.hook_resid_pre", f"{block}.hook_resid_post"]
        cache = cached(model, golden.batch, ends, golden.noise, ablate_block(model, block, "skip"))
        assert torch.equal(cache[ends[0]], cache[ends[1]]), block
    assert {block for block in blocks if block not in exact} == {
        block for block in blocks if f"{block}.hook_pre_ln1" in model.points
    }


def test_blocks_are_ablated_by_zero_mean_and_other_tokens(tiny_model: HookedVLA) -> None:
    obs, output = make_observation(2, 9, ["lift the red block", "push it"]), "vlm.blocks.1.hook_resid_post"
    means = mean_activations(tiny_model, runs(), [output])
    banks = sample_tokens(tiny_model, runs(), [output], 12, seed=0)
    found = {}
    for kind, sources in (("zero", None), ("mean", means), ("resample", banks)):
        edits = ablate_block(tiny_model, "vlm.blocks.1", kind, sources)
        found[kind] = cached(tiny_model, obs, [output], edits=edits)[output]
    assert not found["zero"].any()
    assert torch.equal(found["mean"], means[output].expand_as(found["mean"]))
    tokens = found["resample"].flatten(0, 1)
    assert (tokens[:, None] == banks[output][None]).all(-1).any(1).all()
    assert tokens.unique(dim=0).shape[0] > 3


def test_means_are_those_of_the_runs(tiny_model: HookedVLA) -> None:
    caches = [cached(tiny_model, obs, [VLM, EXPERT], noise) for obs, noise in runs(3)]
    means = mean_activations(tiny_model, runs(3), [VLM, EXPERT])
    assert_close(means[VLM], torch.cat([cache[VLM] for cache in caches]).mean(0))
    assert_close(means[EXPERT], torch.cat([cache[EXPERT] for cache in caches], dim=1).mean(1, keepdim=True))
    # a mean of each step fits each step
    edits = ablate_block(tiny_model, "expert.blocks.2", "mean", means)
    assert_close(cached(tiny_model, runs()[0][0], [EXPERT], edits=edits)[EXPERT][3, 1], means[EXPERT][3, 0])
    whole = mean_activations(tiny_model, runs(3), [VLM, EXPERT], per="site")
    with torch.no_grad():
        valid = [tiny_model.segments(tiny_model.prepare(obs))["vlm"].mask("pad").logical_not() for obs, _ in runs(3)]
    tokens = torch.cat([cache[VLM][mask] for cache, mask in zip(caches, valid, strict=True)])
    assert not all(mask.all() for mask in valid)
    assert_close(whole[VLM], tokens.mean(0))
    assert_close(whole[EXPERT], torch.cat([cache[EXPERT] for cache in caches], dim=1).mean((0, 1, 2)))


def test_heads_and_neurons_are_ablated_alone(tiny_model: HookedVLA) -> None:
    obs, z, post = make_observation(2, 9), "expert.blocks.0.attn.hook_z", "vlm.blocks.1.mlp.hook_post"
    before = cached(tiny_model, obs, [z, post])
    heads = cached(tiny_model, obs, [z], edits=ablate_heads(z, [1], "zero"))[z]
    assert not heads[..., 1, :].any() and torch.equal(heads[0, ..., 0, :], before[z][0, ..., 0, :])
    means = mean_activations(tiny_model, runs(), [post], per="site")
    neurons = cached(tiny_model, obs, [post], edits=ablate_neurons(post, [3, 7], "mean", means))[post]
    assert_close(neurons[..., [3, 7]], means[post][[3, 7]].expand_as(neurons[..., [3, 7]]))
    others = [i for i in range(neurons.shape[-1]) if i not in (3, 7)]
    assert torch.equal(neurons[..., others], before[post][..., others])


def test_which_blocks_there_are(tiny_model: HookedVLA) -> None:
    assert list_blocks(tiny_model, ["expert"]) == [f"expert.blocks.{i}" for i in range(4)]
    assert {block.split(".")[0] for block in list_blocks(tiny_model)} == {"vision", "vlm", "expert"}
    alive = [block for block in list_blocks(tiny_model, ["vlm"]) if reaches_action(tiny_model, block)]
    assert alive == ["vlm.blocks.0", "vlm.blocks.1", "vlm.blocks.2"], "only keys and values of the last one are read"
    with pytest.raises(ValueError, match=r"pathways \['encoder'\] have no blocks; those that have are"):
        list_blocks(tiny_model, ["encoder", "vlm"])


def test_errors_name_what_is_missing(tiny_model: HookedVLA) -> None:
    with pytest.raises(KeyError, match=r"no block 'vlm.blocks.9'; nearest: \['vlm.blocks.3'"):
        ablate_block(tiny_model, "vlm.blocks.9", "zero")
    with pytest.raises(ValueError, match="unknown ablation 'median'"):
        ablate_block(tiny_model, "vlm.blocks.1", "median")  # pyright: ignore[reportArgumentType]
    with pytest.raises(KeyError, match=r"ablation 'mean' of vlm.blocks.1.hook_resid_post needs sources"):
        ablate_block(tiny_model, "vlm.blocks.1", "mean", {EXPERT: torch.zeros(48)})
    with pytest.raises(ValueError, match="ablated by 'zero'"):
        ablate_heads("vlm.blocks.1.attn.hook_z", [0], "skip")
    with pytest.raises(ValueError, match="no runs"):
        mean_activations(tiny_model, [], [VLM])
    with pytest.raises(ValueError, match="no runs"):
        sample_tokens(tiny_model, [], [VLM], 3, seed=0)
    longer = (make_observation(1, 0, ["lift the red block and put it down"]), NOISE[:1])
    with pytest.raises(ValueError, match=f"{VLM} has .* places in one run and"):
        mean_activations(tiny_model, [*runs(1), longer], [VLM])
