"""The cache: what it holds, how it is cut, saved and kept safe."""

import gc
import pickle
import weakref

import pytest
import torch
from public_checkpoints import make_observation
from safetensors.torch import save_file
from torch import Tensor

from hooked_vla import ActivationCache, HookedVLA, Observation

RESID = "vlm.blocks.2.hook_resid_post"
PATTERN = "expert.blocks.0.attn.hook_pattern"


@pytest.fixture
def cache(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> ActivationCache:
    with torch.no_grad():
        return tiny_model.run_with_cache(observation, noise=noise)[1]


def test_it_is_a_dictionary_of_plain_tensors(cache: ActivationCache, tiny_model: HookedVLA) -> None:
    assert len(list(cache)) == len(cache) == len(cache.keys()) == len(dict(cache.items()))
    assert all(type(value) is Tensor for value in cache.values())
    assert "vlm.blocks.1.hook_resid_pre" in cache and "vlm.blocks.1.hook_resid_pre" not in list(cache)
    assert torch.equal(cache["vlm.blocks.1.hook_resid_pre"], cache["vlm.blocks.0.hook_resid_post"])
    assert set(cache) | set(cache.aliases) == set(tiny_model.points)
    with pytest.raises(KeyError, match=r"vlm.blocks.2.hook_resid_pst.*vlm.blocks.2.hook_resid_post"):
        cache["vlm.blocks.2.hook_resid_pst"]


def test_expert_entries_have_a_leading_denoise_axis(cache: ActivationCache, tiny_model: HookedVLA) -> None:
    assert cache["expert.hook_velocity"].shape == (4, 2, 8, 8)
    assert cache["expert.hook_velocity"].axes == ("denoise", "batch", "chunk", "d_action")
    assert cache[RESID].shape == (2, 39, 64) and cache[RESID].axes == ("batch", "seq", "d_model")
    assert cache["expert.blocks.1.cross_attn.hook_prefix_k"].shape == (4, 2, 39, 2, 16)


def test_segments_of_residuals_and_patterns(cache: ActivationCache) -> None:
    resid = cache[RESID]
    assert torch.equal(resid.segment("image:wrist"), resid[:, 4:8])
    assert torch.equal(resid.segment("image:*"), resid[:, :8])
    assert torch.equal(resid.segment("state"), resid[:, -1:])
    with pytest.raises(ValueError, match=r"'language'.*\[30, 5\] tokens.*pad_value"):
        resid.segment("language")
    padded = resid.segment("language", pad_value=0.0)
    assert torch.equal(padded[0], resid[0, 8:38]) and torch.equal(padded[1, :5], resid[1, 8:13])
    assert (padded[1, 5:] == 0).all()
    assert cache.rows([1])[RESID].segment("language").shape == (1, 5, 64)
    with pytest.raises(KeyError, match="no token segment 'image:top'"):
        resid.segment("image:top")
    pattern = cache[PATTERN]
    assert torch.equal(pattern.segment("image:agent", axis="key"), pattern[..., :4])
    assert torch.equal(pattern.segment("action", axis="query"), pattern)
    assert torch.equal(pattern.segment({"query": "action", "key": "image:wrist"}), pattern[..., 4:8])
    with pytest.raises(ValueError, match=r"pass axis=.*\['key', 'query'\]"):
        pattern.segment("action")
    with pytest.raises(ValueError, match="token axes"):
        cache["head.hook_actions"].segment("action")
    assert torch.equal(cache["vision.blocks.0.hook_resid_mid"].segment("image:wrist"),
                       cache["vision.blocks.0.hook_resid_mid"][1::2])  # fmt: skip


def test_rows_steps_and_devices(cache: ActivationCache, tiny_model: HookedVLA, noise: Tensor) -> None:
    row = cache.rows([1])
    assert row.batch_size == 1
    assert torch.equal(row[RESID], cache[RESID][1:2])
    assert torch.equal(row["expert.hook_velocity"], cache["expert.hook_velocity"][:, 1:2])
    assert torch.equal(row["vision.hook_tokens"], cache["vision.hook_tokens"][2:4])
    assert torch.equal(row["vision.hook_pos_embed"], cache["vision.hook_pos_embed"])
    assert torch.equal(cache.rows(slice(0, 1))[RESID], cache[RESID][:1])
    late = cache.denoise_steps([3, 1])
    assert torch.equal(late["expert.hook_velocity"], cache["expert.hook_velocity"][[3, 1]])
    assert torch.equal(late[RESID], cache[RESID]) and late[PATTERN].shape[0] == 2
    with pytest.raises(KeyError, match=r"\[7\]"):
        cache.denoise_steps([7])
    half = cache.to(dtype=torch.float16)
    assert half[RESID].dtype == torch.float16 and half.nbytes * 2 == cache.nbytes
    assert cache.cpu()[RESID].device.type == "cpu"


def test_residual_stream_decomposition(cache: ActivationCache) -> None:
    for pathway in ("vision", "vlm", "expert"):
        parts, labels = cache.decompose_resid(pathway)
        last = cache.resid_labels(pathway)[-1]
        torch.testing.assert_close(parts.sum(0), cache[last] * 1, rtol=1e-5, atol=1e-5)
        assert labels[0] == f"{pathway}.hook_tokens" and len(labels) == len(parts)
        early, _ = cache.decompose_resid(pathway, layer=1)
        torch.testing.assert_close(early.sum(0), cache[f"{pathway}.blocks.1.hook_resid_pre"] * 1, rtol=1e-5, atol=1e-5)
    accumulated = cache.accumulated_resid("vlm", incl_mid=True)
    labels = cache.resid_labels("vlm", incl_mid=True)
    assert len(labels) == len(accumulated) == 9 and labels[1] == "vlm.blocks.0.hook_resid_mid"
    assert torch.equal(accumulated[-1], cache["vlm.blocks.3.hook_resid_post"])
    assert cache.stack("vlm.blocks.*.hook_mlp_out").shape == (4, 2, 39, 64)
    with pytest.raises(KeyError, match="audio"):
        cache.accumulated_resid("audio")


def test_save_and_load(cache: ActivationCache, tmp_path) -> None:
    file = tmp_path / "run.safetensors"
    cache.rows([1]).save(file)
    loaded = ActivationCache.load(file)
    assert list(loaded) == list(cache) and loaded.aliases == cache.aliases and loaded.batch_size == 1
    for name in cache:
        assert torch.equal(loaded[name], cache.rows([1])[name]), name
        assert loaded[name].axes == cache[name].axes
    assert loaded[RESID].segment("language").shape == (1, 5, 64)
    assert loaded[PATTERN].segment("action", axis="key").shape == (4, 1, 4, 8, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]
    bf16 = cache.to(dtype=torch.bfloat16)
    bf16.save(file)
    assert torch.equal(ActivationCache.load(file)[RESID], bf16[RESID])


def test_load_refuses_what_is_not_a_cache(cache: ActivationCache, tmp_path) -> None:
    foreign, cut = tmp_path / "foreign.safetensors", tmp_path / "cut.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match="foreign.safetensors is not an activation cache"):
        ActivationCache.load(foreign)
    cache.save(cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut.safetensors is truncated"):
        ActivationCache.load(cut)
    with pytest.raises(FileNotFoundError):
        ActivationCache.load(tmp_path / "none.safetensors")


def test_a_failed_save_leaves_the_old_file(cache: ActivationCache, tmp_path) -> None:
    file = tmp_path / "run.safetensors"
    cache.save(file)
    before = file.read_bytes()
    broken = cache.rows([0])
    broken.parts[RESID][0] = torch.zeros(2, 2, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        broken.save(file)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_options_of_the_run(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    with torch.no_grad():
        actions, cache = tiny_model.run_with_cache(observation, "*.hook_resid_*", noise=noise, dtype=torch.float16)
        assert actions is not None and all(value.dtype == torch.float16 for value in cache.values())
        assert cache["vlm.blocks.1.hook_resid_pre"].site == "vlm.blocks.0.hook_resid_post"
        none, cut = tiny_model.run_with_cache(observation, noise=noise, stop_at=RESID)
        assert none is None and RESID in cut and "vlm.blocks.3.hook_resid_mid" not in cut
        assert not any(name.startswith("expert") for name in cut)
    size = tiny_model.cache_size(observation, "*.hook_resid_*", dtype=torch.float16)
    assert size == cache.nbytes
    with pytest.raises(MemoryError, match=f"{size:,} bytes, more than the limit of 1,000"):
        tiny_model.run_with_cache(observation, "*.hook_resid_*", noise=noise, dtype=torch.float16, max_bytes=1000)
    with pytest.raises(MemoryError):
        tiny_model.cache_size(observation, max_bytes=1000)
    with pytest.raises(TypeError):
        tiny_model.run_with_cache(observation, retain_graph=True)  # pyright: ignore


def test_gradients_flow_through_the_cache(tiny_model: HookedVLA, observation: Observation, noise: Tensor) -> None:
    _, cache = tiny_model.run_with_cache(observation, [RESID, "expert.hook_velocity"], noise=noise)
    tiny_model.zero_grad()
    cache["expert.hook_velocity"].pow(2).sum().backward(retain_graph=True)
    weight = tiny_model.net.vlm.blocks[0].mlp.down_proj.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    tiny_model.zero_grad()
    cache[RESID].segment("state").sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0
    tiny_model.zero_grad()


def test_cached_gradients_are_those_of_finite_differences(tiny_model: HookedVLA, noise: Tensor) -> None:
    observation, site = make_observation(), "expert.blocks.1.hook_resid_post"
    _, cache = tiny_model.run_with_cache(observation, [site, RESID], noise=noise, incl_bwd=True)
    gradient = cache[f"{site}_grad"]
    assert gradient.shape == cache[site].shape and cache[f"{RESID}_grad"].shape == cache[RESID].shape
    direction = torch.randn(gradient[2].shape, generator=torch.Generator().manual_seed(0))

    def shifted(by: float) -> float:
        hook = (site, lambda value, hook: value + by * direction)
        with torch.no_grad():
            return float(tiny_model.run_with_hooks(observation, [hook], noise=noise, at_steps=[2]).chunk.sum())

    numeric = (shifted(1e-2) - shifted(-1e-2)) / 2e-2
    assert numeric == pytest.approx(float((gradient[2] * direction).sum()), rel=2e-2)
    squared = tiny_model.run_with_cache(observation, [site], noise=noise, incl_bwd=lambda a: a.chunk.pow(2).sum())[1]
    assert not torch.allclose(squared[f"{site}_grad"], gradient)
    tiny_model.zero_grad()


def test_clone_protects_and_detection_finds_in_place_edits(
    tiny_model: HookedVLA, observation: Observation, noise: Tensor
) -> None:
    """resid_pre of a block is the very tensor that resid_post of the block before showed."""
    before, after = "vlm.blocks.0.hook_resid_post", "vlm.blocks.1.hook_resid_pre"
    with torch.no_grad():
        expected = tiny_model.run_with_cache(observation, before, noise=noise)[1][before]
        with tiny_model.hooks([(after, lambda value, hook: value.zero_())]):
            bare = tiny_model.run_with_cache(observation, [before, after], noise=noise)[1]
            assert (bare[before] == 0).all()
            safe = tiny_model.run_with_cache(observation, [before, after], noise=noise, clone=True)[1]
            assert torch.equal(safe[before], expected) and (safe[after] == 0).all()
            with pytest.raises(RuntimeError, match=rf"changed in place.*{before}"):
                tiny_model.run_with_cache(observation, [before, after], noise=noise, detect_inplace=True)
        tiny_model.run_with_cache(observation, noise=noise, detect_inplace=True)


def test_a_kept_tensor_keeps_neither_model_nor_inputs_alive(noise: Tensor) -> None:
    model = HookedVLA.from_spec("smolvla", size="tiny")
    inputs = model.prepare(make_observation())
    with torch.no_grad():
        kept = model.run_with_cache(inputs, RESID, noise=noise)[1][RESID]
    alive = weakref.ref(model), weakref.ref(inputs.images)
    del model, inputs
    gc.collect()
    assert [each() for each in alive] == [None, None]
    assert kept.segment("state").shape == (2, 1, 64)


@pytest.mark.parametrize("options", [{"dtype": torch.float16}, {"clone": True}, {}])
def test_estimates_hold_with_conversions_and_onlookers(
    options: dict, tiny_model: HookedVLA, observation: Observation, noise: Tensor
) -> None:
    for names_filter in ("expert.*.hook_prefix_k", None, "*.cross_attn.*"):
        expected = tiny_model.cache_size(observation, names_filter, dtype=options.get("dtype"))
        with torch.no_grad(), tiny_model.hooks([("expert.*", lambda value, hook: None)]):
            cache = tiny_model.run_with_cache(observation, names_filter, noise=noise, **options)[1]
        assert cache.nbytes == expected


def test_vision_segments_are_cut_by_camera(cache: ActivationCache) -> None:
    pattern = cache["vision.blocks.0.attn.hook_pattern"]
    both = pattern.segment({"query": "image:wrist", "key": "image:wrist"})
    assert torch.equal(both, pattern[1::2])
    with pytest.raises(ValueError, match="no rows whose tokens could differ"):
        cache["vision.hook_pos_embed"].segment("image:agent")


def test_layers_count_from_the_model_and_not_from_what_is_cached(
    tiny_model: HookedVLA, observation: Observation, noise: Tensor, cache: ActivationCache
) -> None:
    assert torch.equal(cache.decompose_resid("vlm", -1)[0], cache.decompose_resid("vlm")[0])
    assert torch.equal(cache.accumulated_resid("vlm", -1), cache.accumulated_resid("vlm"))
    with pytest.raises(ValueError, match=r"layer 9: vlm has blocks 0\.\.3"):
        cache.decompose_resid("vlm", 9)
    with torch.no_grad():
        _, early = tiny_model.run_with_cache(observation, ["vlm.hook_tokens", "vlm.blocks.[01].*"], noise=noise)
    with pytest.raises(KeyError, match=r"vlm.blocks.2.hook_attn_out"):
        early.decompose_resid("vlm")
    stacked = cache.stack("vlm.blocks.[01].hook_resid_*")
    order = [f"vlm.blocks.{i}.hook_resid_{at}" for i in (0, 1) for at in ("pre", "mid", "post")]
    assert torch.equal(stacked, torch.stack([cache[name] for name in order]))


def test_rows_by_number_mask_and_negative_number(cache: ActivationCache) -> None:
    assert torch.equal(cache.rows(1)[RESID], cache[RESID][1:])
    assert torch.equal(cache.rows(-1)[RESID], cache[RESID][1:])
    assert torch.equal(cache.rows([True, False])[RESID], cache[RESID][:1])
    with pytest.raises(IndexError, match=r"rows \[2\]: the cache has rows 0\.\.1"):
        cache.rows([2])
    some = cache.denoise_steps(0)
    assert some["expert.hook_velocity"].shape[0] == 1 and some.nbytes < cache.nbytes


def test_caches_hold_what_was_and_can_be_pickled(
    tiny_model: HookedVLA, observation: Observation, noise: Tensor
) -> None:
    mine = noise.clone()
    with torch.no_grad():
        actions, cache = tiny_model.run_with_cache(observation, ["expert.hook_noisy_actions", "head.*"], noise=mine)
    finished = cache["head.hook_actions"].clone()
    mine.zero_()
    actions.chunk.zero_()
    assert torch.equal(cache["expert.hook_noisy_actions"][0], noise)
    assert torch.equal(cache["head.hook_actions"], finished)
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again["head.hook_actions"], finished)
    model = pickle.loads(pickle.dumps(tiny_model))
    assert torch.equal(model(observation, noise).chunk, tiny_model(observation, noise).chunk)
