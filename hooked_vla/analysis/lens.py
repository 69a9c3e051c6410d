"""What the language model's numbers say in words: residual streams and MLP neurons read in the directions of tokens.

>>> vocabulary = read_vocabulary(model, words=words_of(model.processor.tokenizer.load(), 32000))
>>> logit_lens(cache["vlm.blocks.8.hook_resid_post"], vocabulary)              # [batch seq d_vocab]
>>> found = find_neurons(model, vocabulary, ["fast", "slow"], n_top=10)        # neurons that write these words

Logit lens: nostalgebraist 2020 (lesswrong, "interpreting GPT: the logit lens"). Value vectors: neuron i of an MLP adds
activation_i · W_out[i] to the stream, and W_U W_out[i] says which tokens that speaks for (Geva et al., arXiv
2203.14680; in robot policies Häon et al., arXiv 2509.00328).
"""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import ActivationCache, HookedModel, HookPoint
from hooked_vla.hooks.names import layer, leaf, pathway, resolve

if TYPE_CHECKING:
    import pandas as pd

Source = Literal["unembed", "embed"]
# neurons whose logits are made at once, so that a vocabulary of 257,000 takes some 250 MB
_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Directions of tokens in a residual stream.

    W_U: one a token. norm: the final norm, without hook points. source: "unembed" where they are the model's own output
    layer, "embed" where they are its input embeddings. words: each token's text. pathway: whose stream.
    """

    W_U: Float[Tensor, "d_model d_vocab"]
    norm: nn.Module
    source: Source
    words: tuple[str, ...]
    pathway: str

    def ids(self, words: Sequence[str]) -> list[int]:
        """The tokens whose text is, without spaces and in lower case, one of `words`.

        Raises ValueError for a word that no token is.
        """
        found: dict[str, list[int]] = {word.strip().lower(): [] for word in words}
        for i, text in enumerate(self.words):
            if (plain := text.strip().lower()) in found:
                found[plain].append(i)
        if missing := [word for word, ids in found.items() if not ids]:
            raise ValueError(f"no token is {missing}; try a part of the word, or a synonym")
        return [i for ids in found.values() for i in ids]


def words_of(tokenizer: Any, d_vocab: int) -> tuple[str, ...]:
    """The text of each id 0..d_vocab-1; "<id>" for those that the tokenizer does not know."""
    known = len(tokenizer)
    return tuple(tokenizer.decode([i]) if i < known else f"<{i}>" for i in range(d_vocab))


def read_vocabulary(
    model: HookedModel, words: Sequence[str], source: Source = "unembed", pathway: str = "vlm"
) -> Vocabulary:
    """The token directions of a pathway.

    source: "unembed", its output layer: only where that was trained does it mean anything (a policy that acts through
    an expert does not train it). "embed", its input embeddings in place of one: what the policy itself learned to read,
    and the same numbers where the two are tied.
    Raises ValueError where there is no such pathway or layer, saying what there is, and for words of another number.
    """
    part: Any = getattr(model.net, pathway, None)
    if not isinstance(getattr(part, "embed", None), nn.Embedding):
        raise ValueError(f"the model has no vocabulary in a pathway {pathway!r}: it reads no words there")
    if source not in ("unembed", "embed"):
        raise ValueError(f"source must be 'unembed' or 'embed', got {source!r}")
    if source == "unembed" and getattr(part, "unembed", None) is None:
        raise ValueError(
            f"{pathway} has no output layer over its vocabulary, so that there are no logits; source='embed' reads in "
            "the directions of its input embeddings instead"
        )
    weight = part.unembed.weight if source == "unembed" else part.embed.weight
    if len(words) != len(weight):
        raise ValueError(f"{pathway} knows {len(weight)} tokens, got {len(words)} words")
    norm = getattr(part, "ln_final", None)
    bare = nn.Identity() if norm is None else without_points(norm)
    return Vocabulary(weight.detach().T, bare, source, tuple(words), pathway)


def without_points(module: nn.Module) -> nn.Module:
    """The same module, its parameters shared, whose hook points nobody listens to."""
    bare = copy(module)
    for name, value in vars(module).items():
        if isinstance(value, HookPoint):
            setattr(bare, name, HookPoint(" ".join(value.axes), value.dtype))
    return bare


@torch.no_grad()
def logit_lens(resid: Float[Tensor, "*any d_model"], vocabulary: Vocabulary) -> Float[Tensor, "*any d_vocab"]:
    """Logits that the model would have if its residual stream ended here: final norm, then the token directions."""
    flat = vocabulary.norm(resid.reshape(1, -1, resid.shape[-1]).to(vocabulary.W_U.dtype))
    return (flat @ vocabulary.W_U).reshape(*resid.shape[:-1], -1).float()


def lens_table(
    cache: ActivationCache,
    vocabulary: Vocabulary,
    sites: str | Sequence[str] = "*.hook_resid_post",
    tokens: str | None = None,
    n_top: int = 5,
) -> "pd.DataFrame":
    """The likeliest tokens at every place of residual streams: site, layer, row, position, segment, rank, token, word,
    logit, probability.

    sites: of the vocabulary's pathway. tokens: a token segment; None: all that are not padding.
    Raises KeyError for sites that are not cached or a segment that is not there, ValueError for another pathway's sites
    or those of a pathway with steps.
    """
    with needs_analysis_extra():
        import pandas as pd
    rows = []
    for site in resolve(sites, list(cache)):
        if pathway(site) != vocabulary.pathway or "d_model" not in cache.entries[cache[site].site].axes:
            raise ValueError(f"{site} is no residual stream of {vocabulary.pathway}, whose vocabulary this is")
        entry = cache.entries[cache[site].site]
        if entry.steps is not None:
            raise ValueError(f"{site} has steps: take those of interest and pass them to logit_lens")
        segments = cache.segments[entry.streams["seq"]]
        for row, labels in enumerate(segments.labels):
            names = [segments.names[int(label)] for label in labels]
            wanted = segments.positions(tokens)[row].tolist() if tokens else range(len(names))
            for position in wanted:
                if tokens is None and names[position] == "pad":
                    continue
                logits = logit_lens(cache[site][row, position], vocabulary)
                chances = logits.softmax(-1)
                for rank, token in enumerate(logits.topk(n_top).indices.tolist()):
                    rows.append(
                        (site, layer(site), row, position, names[position], rank, token, vocabulary.words[token],
                         float(logits[token]), float(chances[token]))
                    )  # fmt: skip
    columns = ["site", "layer", "row", "position", "segment", "rank", "token", "word", "logit", "probability"]
    return pd.DataFrame(rows, columns=columns)


def neuron_sites(model: HookedModel, pathway: str = "vlm", only_live: bool = True) -> list[str]:
    """The hook_post of every MLP of a pathway's blocks: what its neurons are multiplied by W_out with.

    only_live: leave out those that no action depends on; where an expert reads the keys and values of every block, the
    last block's MLP is one of them.
    Raises ValueError where there are none.
    """
    found = [
        name for name, site in model.hook_points.items()
        if site.pathway == pathway and name.endswith(".mlp.hook_post") and (site.reaches_action or not only_live)
    ]  # fmt: skip
    if not found:
        raise ValueError(f"the pathway {pathway!r} has no MLPs whose neurons can be read")
    return found


def value_vectors(model: HookedModel, site: str) -> Float[Tensor, "d_mlp d_model"]:
    """W_out of the MLP whose hook_post this is: what each neuron writes when it is 1.

    Raises ValueError for another site.
    """
    mlp = model.net.get_submodule(site.rpartition(".")[0]) if leaf(site) == "hook_post" else None
    if not hasattr(mlp, "W_out"):
        raise ValueError(f"{site} is not the hook_post of an MLP")
    return mlp.W_out.detach()  # pyright: ignore[reportOptionalMemberAccess]


@torch.no_grad()
def _value_logits(
    model: HookedModel, site: str, vocabulary: Vocabulary
) -> Iterator[tuple[int, Float[Tensor, "neuron d_vocab"]]]:
    """Logits of value vectors, some neurons at a time, each with the number of its first; without the final norm, as
    published."""
    vectors = value_vectors(model, site)
    for start in range(0, len(vectors), _AT_ONCE):
        yield start, (vectors[start : start + _AT_ONCE].to(vocabulary.W_U.dtype) @ vocabulary.W_U).float()


def neuron_table(
    model: HookedModel, vocabulary: Vocabulary, sites: Sequence[str] | None = None, n_top: int = 10
) -> "pd.DataFrame":
    """The tokens that each neuron speaks for most: site, layer, neuron, rank, token, word, logit, z.

    z: the logit in standard deviations from the neuron's mean over the vocabulary.
    sites: as `neuron_sites` gives them, which is the default. Raises ValueError as that.
    """
    with needs_analysis_extra():
        import pandas as pd
    parts = []
    for site in neuron_sites(model, vocabulary.pathway) if sites is None else sites:
        for start, logits in _value_logits(model, site, vocabulary):
            top = logits.topk(n_top, dim=-1)
            z = (top.values - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True)
            n = len(logits)
            tokens = top.indices.flatten().tolist()
            parts.append(
                pd.DataFrame(
                    {
                        "site": site,
                        "layer": layer(site),
                        "neuron": torch.arange(start, start + n).repeat_interleave(n_top).numpy(),
                        "rank": torch.arange(n_top).repeat(n).numpy(),
                        "token": tokens,
                        "word": [vocabulary.words[token] for token in tokens],
                        "logit": top.values.flatten().cpu().numpy(),
                        "z": z.flatten().cpu().numpy(),
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def find_neurons(
    model: HookedModel,
    vocabulary: Vocabulary,
    keywords: Sequence[str],
    sites: Sequence[str] | None = None,
    n_top: int = 10,
) -> "pd.DataFrame":
    """Neurons that have a keyword among their `n_top` tokens: the rows of `neuron_table` that say it, best z first.

    Raises ValueError for a keyword that no token is, and as `neuron_table`.
    """
    ids = vocabulary.ids(keywords)
    table = neuron_table(model, vocabulary, sites, n_top)
    said: pd.DataFrame = table.loc[table["token"].isin(ids)]
    return said.sort_values(by="z", ascending=False, kind="stable").reset_index(drop=True)


@dataclass(frozen=True, eq=False)
class NeuronClusters:
    """Neurons of one MLP by what they write. of: each neuron's cluster. words: what each cluster's centre speaks for.

    inertia: sum of squared distances to the centres, of value vectors of length 1.
    """

    site: str
    of: Int[Tensor, " d_mlp"]
    words: tuple[tuple[str, ...], ...]
    inertia: float


def cluster_neurons(
    model: HookedModel, vocabulary: Vocabulary, site: str, n_clusters: int, seed: int = 0, n_words: int = 8
) -> NeuronClusters:
    """k-means of value vectors, each divided by its length so that only what they say counts.

    Raises ValueError for more clusters than neurons, ModuleNotFoundError where the `analysis` extra is not installed.
    """
    with needs_analysis_extra():
        from sklearn.cluster import KMeans
    vectors = value_vectors(model, site).float().cpu()
    if not 1 <= n_clusters <= len(vectors):
        raise ValueError(f"{site} has {len(vectors)} neurons, which do not make {n_clusters} clusters")
    unit = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    # its stubs know neither numbers of starts nor results
    found: Any = KMeans(n_clusters, n_init=10, random_state=seed).fit(unit.numpy())  # pyright: ignore[reportArgumentType]
    centres = torch.from_numpy(found.cluster_centers_).to(vocabulary.W_U)
    tops = (centres @ vocabulary.W_U).topk(n_words, dim=-1).indices.tolist()
    words = tuple(tuple(vocabulary.words[token] for token in row) for row in tops)
    return NeuronClusters(site, torch.from_numpy(found.labels_).long(), words, float(found.inertia_))
