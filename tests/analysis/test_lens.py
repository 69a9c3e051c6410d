"""Lenses: where the stream ends, the lens is the model's own logits; planted words are found again."""

import numpy as np
import pytest
import torch

from hooked_vla import HookedVLA, Observation
from hooked_vla.analysis.lens import (
    cluster_neurons,
    find_neurons,
    lens_table,
    logit_lens,
    neuron_sites,
    neuron_table,
    read_vocabulary,
    value_vectors,
    words_of,
)


def _words(n: int) -> list[str]:
    return [f"w{i}" for i in range(n)]


def _planted(model: HookedVLA, site: str, neuron: int, token: int) -> None:
    """Make a neuron write a token's direction."""
    mlp = model.net.get_submodule(site.rpartition(".")[0])
    with torch.no_grad():
        mlp.down_proj.weight[:, neuron] = model.net.vlm.unembed.weight[token] * 5


@pytest.fixture
def smolvla() -> HookedVLA:
    return HookedVLA.from_spec("smolvla", size="tiny", seed=3)


@pytest.mark.parametrize("name", ["openvla", "pi0_fast"])
def test_at_the_end_of_the_stream_the_lens_is_the_models_logits(name):
    model = HookedVLA.from_spec(name, size="tiny", seed=0)
    cameras = model.processor.features.cameras or ("agent",)
    obs = Observation(
        {each: np.full((32, 32, 3), 99, np.uint8) for each in cameras},
        np.zeros(model.processor.features.d_state, np.float32), "push",
    )  # fmt: skip
    last = f"vlm.blocks.{len(model.net.vlm.blocks) - 1}.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(obs, [last, "vlm.hook_logits"])
    vocabulary = read_vocabulary(model, _words(model.net.vlm.unembed.out_features))
    logits = logit_lens(cache[last], vocabulary)
    assert logits.shape == (*cache[last].shape[:2], len(vocabulary.words))
    # the first answer is read at the prompt's last token
    errors = (logits - cache["vlm.hook_logits"][:, None]).abs().amax(-1)
    assert float(errors.min()) < 1e-5 < float(errors.max())


def test_the_lens_leaves_hooks_alone(smolvla, observation):
    vocabulary = read_vocabulary(smolvla, _words(smolvla.net.vlm.unembed.out_features))
    fired = []
    with smolvla.hooks([("vlm.ln_final.*", lambda value, hook: fired.append(hook.name))]):
        logit_lens(torch.randn(2, 3, smolvla.net.vlm.d_model), vocabulary)
        assert not fired
        smolvla(observation)
    assert fired


def test_a_table_of_the_likeliest_tokens(smolvla, observation, noise):
    with torch.no_grad():
        _, cache = smolvla.run_with_cache(observation, "vlm.blocks.*.hook_resid_post", noise)
    vocabulary = read_vocabulary(smolvla, _words(smolvla.net.vlm.unembed.out_features))
    table = lens_table(cache, vocabulary, "vlm.blocks.*.hook_resid_post", "language", n_top=3)
    sites = [name for name in cache if name.endswith("hook_resid_post")]
    n_tokens = sum(len(at) for at in cache.segments["vlm"].positions("language"))
    assert len(table) == len(sites) * n_tokens * 3 and set(table["segment"]) == {"language"}
    first = table.iloc[0]
    logits = logit_lens(cache[first["site"]][first["row"], first["position"]], vocabulary)
    assert first["token"] == int(logits.argmax()) and first["word"] == f"w{first['token']}"
    assert first["probability"] == pytest.approx(float(logits.softmax(-1).max()))
    assert (table.groupby(["site", "row", "position"])["logit"].diff().dropna() <= 0).all()


def test_sites_of_another_stream_are_refused(smolvla, observation, noise):
    with torch.no_grad():
        _, cache = smolvla.run_with_cache(observation, "*.hook_resid_post", noise)
    vocabulary = read_vocabulary(smolvla, _words(smolvla.net.vlm.unembed.out_features))
    with pytest.raises(ValueError, match="is no residual stream of vlm"):
        lens_table(cache, vocabulary, "expert.blocks.0.hook_resid_post")


def test_a_planted_neuron_is_found_by_its_word(smolvla):
    site = neuron_sites(smolvla)[0]
    _planted(smolvla, site, neuron=5, token=7)
    words = _words(smolvla.net.vlm.unembed.out_features)
    words[7] = " Fast"
    vocabulary = read_vocabulary(smolvla, words)
    found = find_neurons(smolvla, vocabulary, ["fast"], n_top=1)
    best = found.iloc[0]
    assert (best["site"], best["neuron"], best["word"], best["rank"]) == (site, 5, " Fast", 0)
    with pytest.raises(ValueError, match=r"no token is \['quick'\]"):
        find_neurons(smolvla, vocabulary, ["fast", "quick"])


def test_value_vectors_are_what_neurons_write(smolvla):
    site = neuron_sites(smolvla)[0]
    mlp = smolvla.net.get_submodule(site.rpartition(".")[0])
    vectors = value_vectors(smolvla, site)
    one = torch.zeros(mlp.d_mlp)
    one[4] = 1
    torch.testing.assert_close(vectors[4], mlp.down_proj(one))
    with pytest.raises(ValueError, match="is not the hook_post of an MLP"):
        value_vectors(smolvla, "vlm.blocks.0.hook_mlp_out")
    table = neuron_table(smolvla, read_vocabulary(smolvla, _words(smolvla.net.vlm.unembed.out_features)), [site], 2)
    row = table[(table["neuron"] == 4) & (table["rank"] == 0)].iloc[0]
    logits = (vectors[4] @ smolvla.net.vlm.W_U).detach()
    assert row["token"] == int(logits.argmax()) and row["logit"] == pytest.approx(float(logits.max()), rel=1e-5)
    assert row["z"] == pytest.approx(float((logits.max() - logits.mean()) / logits.std()), rel=1e-4)


def test_neurons_that_reach_no_action_are_left_out(smolvla):
    live, every = neuron_sites(smolvla), neuron_sites(smolvla, only_live=False)
    assert every[:-1] == live and not smolvla.hook_points[every[-1]].reaches_action
    with pytest.raises(ValueError, match="'head' has no MLPs"):
        neuron_sites(smolvla, "head")


def test_clusters_find_planted_groups(smolvla):
    site = neuron_sites(smolvla)[0]
    mlp = smolvla.net.get_submodule(site.rpartition(".")[0])
    unembed = smolvla.net.vlm.unembed.weight
    groups = torch.arange(mlp.d_mlp) % 3
    noise = torch.randn(mlp.d_mlp, mlp.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mlp.down_proj.weight[:] = (
            unembed[groups * 10] / unembed[groups * 10].norm(dim=-1, keepdim=True) + 0.02 * noise
        ).T
    vocabulary = read_vocabulary(smolvla, _words(len(unembed)))
    found = cluster_neurons(smolvla, vocabulary, site, 3, seed=1)
    assert len({(int(a), int(b)) for a, b in zip(groups, found.of, strict=True)}) == 3
    assert {words[0] for words in found.words} == {"w0", "w10", "w20"}
    again = cluster_neurons(smolvla, vocabulary, site, 3, seed=1)
    assert torch.equal(found.of, again.of) and found.inertia == again.inertia
    with pytest.raises(ValueError, match="do not make 0 clusters"):
        cluster_neurons(smolvla, vocabulary, site, 0)


def test_models_without_an_output_layer_or_words_say_so():
    xvla = HookedVLA.from_spec("xvla", size="tiny", seed=0)
    n = xvla.net.vlm.embed.num_embeddings
    with pytest.raises(ValueError, match="no output layer over its vocabulary.*source='embed'"):
        read_vocabulary(xvla, _words(n))
    vocabulary = read_vocabulary(xvla, _words(n), source="embed")
    assert torch.equal(vocabulary.W_U, xvla.net.vlm.embed.weight.T)
    with pytest.raises(ValueError, match=f"knows {n} tokens, got 3 words"):
        read_vocabulary(xvla, _words(3), source="embed")
    with pytest.raises(ValueError, match="no vocabulary in a pathway 'vlm'"):
        read_vocabulary(HookedVLA.from_spec("act", size="tiny", seed=0), [])


def test_words_of_ids_that_the_tokenizer_does_not_know():
    class Toy:
        def __len__(self) -> int:
            return 2

        def decode(self, ids: list[int]) -> str:
            return "ab"[ids[0]]

    assert words_of(Toy(), 4) == ("a", "b", "<2>", "<3>")
