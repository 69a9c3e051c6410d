"""The one vocabulary of hook points, and how a request for some of them is understood.

A name is a pathway, then modules, then a leaf: `vlm.blocks.3.attn.hook_pattern`. Leaves are TransformerLens's
words wherever it has one. Anything not listed here fails a test.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

PATHWAYS = {
    "vision": "image encoder; one row per camera image",
    "connector": "map from image features to language-model tokens",
    "vlm": "language model over the prefix: image, language and state tokens; runs once per chunk",
    "encoder": "transformer over observation tokens in a policy without language; runs once per chunk",
    "adapter": "layers between the vlm's features and the expert that reads them; runs once per chunk",
    "expert": "action expert; runs once per denoise step",
    "decode": "the vlm's weights over tokens that the model generates, one at a time after the prefix",
    "head": "what turns the expert's last outputs into an action chunk",
}

# Pathways that run several times per chunk, and the name of the leading step axis of what they cache. A step is one
# pass of the network's loop, counted from 0 in `run.denoise_step`: a denoise step of the expert, or one generated
# token. Of a model that generates, the pass over the prefix is `vlm` and has no step: it chooses the first token.
# `decode` shares the vlm's weights and has hook points of its own: step i reads token i and chooses token i + 1, so
# n tokens take n - 1 steps. Its keys are the prefix's, then one slot for every token that may come, those to come
# masked: so every step has the same shapes and steps stack.
DENOISED = {"expert": "denoise", "decode": "decode"}

MODULES = {
    "blocks": "transformer blocks, numbered from 0",
    "attn": "self-attention, or joint attention over prefix and own tokens",
    "cross_attn": "attention from own tokens to the cached prefix",
    "mlp": "feed-forward network",
    "ln1": "norm before attention",
    "ln2": "norm before the MLP",
    "ln_final": "norm after the last block",
    "ln_cross": "norm before cross-attention, in blocks that have self-attention too",
    "ln_cross_post": "norm after cross-attention has been added to the residual stream (post-norm blocks)",
    "ln_pre": "norm before the first block",
    "ln_in": "norm of a stage's input, before its convolution, or of a head's",
    "ln1_post": "norm after attention has been added to the residual stream (post-norm blocks)",
    "ln2_post": "norm after the MLP has been added to the residual stream (post-norm blocks)",
    "ln_out": "norm of a connector's output",
    "stages": "stages of a convolutional tower, each with a width and a grid of its own, numbered from 0",
    "spatial": "first half of a two-part block: attention between tokens, inside windows",
    "channel": "second half of a two-part block: attention between channels, over all tokens",
    "q_norm": "norm of every head's queries, before rotary positions",
    "k_norm": "norm of every head's keys, before rotary positions",
    "dino": "DINOv2's image tower, where there are several",
    "siglip": "SigLIP's image tower, where there are several",
    "ls1": "learned factor of each channel on attention's output (LayerScale)",
    "ls2": "learned factor of each channel on the MLP's output (LayerScale)",
    "film": "channels of the residual stream scaled and shifted by what a vector says (FiLM)",
    "layers": "hidden layers of an MLP, numbered from 0",
    "head": "what turns the expert's outputs into its prediction, where that runs at every denoise step",
    "codebooks": "codebooks of a residual quantiser, numbered from 0, the coarsest first",
    "decoder": "MLP from the sum of code vectors to an action chunk",
    "towers": "encoders of one camera each, numbered in camera order from 0",
    "pool": "spatial softmax over a feature map",
    "down": "downward levels of a U-Net, each with half the steps of the one before, numbered from 0; two blocks each",
    "mid": "bottom of a U-Net: two blocks",
    "up": "upward levels of a U-Net, numbered from 0 at the bottom; two blocks each",
    "deepstack": "maps from intermediate vision layers to language-model layers, numbered from 0",
}

LEAVES = {
    "hook_patch_embed": "patch embedding of the image, before positions",
    "hook_pos_embed": "position embedding added to the patches; encoder–decoders: to queries and keys of every layer",
    "hook_tokens": "input of the stream's first block",
    "hook_concat": "features of several image towers, their channels one after the other",
    "hook_unscaled": "output of attention or the MLP before its factors (LayerScale)",
    "hook_gamma": "FiLM: the residual stream is multiplied by 1 + this",
    "hook_beta": "FiLM: added after the factor",
    "hook_in": "what the head reads: hidden states of the action tokens, those of one step side by side",
    "hook_shuffled": "image features after space-to-depth",
    "hook_pooled": "mean of the image features over all places, a token of its own",
    "hook_out": "image tokens as the connector hands them over; expert: its tokens as the action decoder reads them",
    "hook_embed": "token embeddings, before image tokens take their places",
    "hook_embed_image": "image tokens, scaled as they enter the prefix",
    "hook_embed_language": "language token embeddings, scaled as they enter the prefix",
    "hook_embed_state": "state token as it enters the prefix, or the expert",
    "hook_embed_future": "learned tokens that enter the expert beside state and actions",
    "hook_embed_action": "action tokens, time included, as they enter the expert",
    "hook_embed_vlm": "outputs of the vlm as they enter the expert as tokens",
    "hook_embed_aux": "image tokens that bypass the vlm, as they enter the expert",
    "hook_soft_prompts": "learned tokens of the row's domain, last in the expert",
    "hook_latent": "latent variable of the demonstrator's style; 0 unless edited",
    "hook_embed_latent": "token of the latent variable",
    "hook_embed_environment": "token of the environment state",
    "hook_conv1": "residual convolution block: after its first convolution, with norm and activation",
    "hook_conv2": "residual convolution block: after its second convolution, with norm, before the shortcut is added",
    "hook_film_scale": "FiLM: the hidden map is multiplied by this (no 1 +)",
    "hook_film_shift": "FiLM: added after the scale",
    "hook_modulated": "residual convolution block: hidden map after FiLM, input of the second convolution",
    "hook_resampled": "U-Net: features at the number of steps of the next level",
    "hook_with_skip": "U-Net: input of an upward level, features from below and then the skip's channels",
    "hook_heatmap": "softmax of a keypoint's map over the positions of the image",
    "hook_keypoints": "position (x, y) of each keypoint, -1..1 from left to right and top to bottom",
    "hook_resid_pre": "residual stream entering the block",
    "hook_resid_mid": "residual stream between attention and MLP (post-norm blocks: after the norm)",
    "hook_resid_post": "residual stream leaving the block (post-norm blocks: after the norm)",
    "hook_pre_ln1": "post-norm blocks: residual stream plus attention's output, before the norm",
    "hook_cross_attn_out": "output of cross-attention, added to the residual stream",
    "hook_resid_mid_cross": "residual stream between cross-attention and MLP (post-norm blocks: after the norm)",
    "hook_pre_ln_cross": "post-norm blocks: residual stream plus cross-attention's output, before the norm",
    "hook_pre_ln2": "post-norm blocks: residual stream plus the MLP's output, before the norm",
    "hook_conv1_out": "output of the depthwise convolution before attention, added to the residual stream",
    "hook_conv2_out": "output of the depthwise convolution before the MLP, added to the residual stream",
    "hook_attn_out": "output of attention, added to the residual stream",
    "hook_mlp_out": "output of the MLP, added to the residual stream",
    "hook_scale": "the norm's divisor: standard deviation or root mean square",
    "hook_normalized": "output of the norm",
    "hook_ada_scale": "adaptive norm: the normed input is multiplied by 1 + this",
    "hook_ada_shift": "adaptive norm: added after the scale",
    "hook_ada_gate": "adaptive norm: what its sublayer makes is multiplied by this before it is added",
    "hook_attn_ungated": "output of attention before its gate; hook_attn_out is after it",
    "hook_mlp_ungated": "output of the MLP before its gate; hook_mlp_out is after it",
    "hook_deepstack": "intermediate vision features added to the block's output at image tokens, 0 elsewhere",
    "hook_q": "queries before rotary positions",
    "hook_k": "keys before rotary positions (cross-attention: projected from the prefix keys)",
    "hook_v": "values (cross-attention: projected from the prefix values)",
    "hook_rot_q": "queries after rotary positions",
    "hook_rot_k": "keys after rotary positions; in the vlm, what the expert will read",
    "hook_prefix_k": "this expert layer's own view of the cached prefix keys",
    "hook_prefix_v": "this expert layer's own view of the cached prefix values",
    "hook_attn_scores": "scaled and masked attention scores",
    "hook_pattern": "attention pattern: scores after softmax",
    "hook_z": "attention-weighted values, per head, before the output projection",
    "hook_pre": "MLP pre-activation (gated: the gate's)",
    "hook_pre_linear": "gated MLP: the linear branch that the activated gate multiplies",
    "hook_post": "MLP hidden activation, input of the output projection",
    "hook_code": "the code drawn from one codebook, one-hot; mixtures may be patched in",
    "hook_code_sum": "sum of the chosen codes' vectors, input of the decoder",
    "hook_decoded": "action chunk that the codes stand for, before the offset",
    "hook_offset": "offset to the decoded action chunk, of the chosen codes",
    "hook_noisy_actions": "action chunk being denoised, as this step begins; an edit carries on",
    "hook_state": "proprioceptive state as the expert reads it",
    "hook_clean_actions": "clean action chunk that the expert predicts, from which the next step begins",
    "hook_time": "embedding of the denoising time",
    "hook_condition": "what conditions the expert's layers: the time after its MLP; U-Net: all that was seen",
    "hook_velocity": "predicted velocity of the action chunk",
    "hook_noise": "predicted noise of the action chunk",
    "hook_logits": "scores of every token of the vocabulary as the next one, at the last position; of every code",
    "hook_action_tokens": "ids of the generated tokens",
    "hook_actions": "the finished, normalised action chunk at its padded width",
}

# points that hold a norm's output where their module has that norm
_NORMED = {
    "hook_tokens": "ln_pre",
    "hook_resid_mid": "ln1_post",
    "hook_resid_mid_cross": "ln_cross_post",
    "hook_resid_post": "ln2_post",
    "hook_out": "ln_out",
}

NamesFilter = None | str | re.Pattern[str] | Iterable["NamesFilter"] | Callable[[str], bool]


def leaf(name: str) -> str:
    """Last part of a hook name."""
    return name.rsplit(".", 1)[-1]


def pathway(name: str) -> str:
    """First part of a hook name."""
    return name.split(".", 1)[0]


def layer(name: str) -> int | None:
    """Block number in a hook name; None where the point is in no block."""
    found = re.search(r"\.blocks\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def is_denoised(name: str) -> bool:
    """Whether the point fires once per step of the network's loop: per denoise step, or per decoded token."""
    return pathway(name) in DENOISED


def meaning(name: str) -> str:
    """One line on what the point holds.

    Raises KeyError for a name outside the vocabulary.
    """
    head, *middle, last = name.split(".")
    unknown = [part for part in middle if part not in MODULES and not part.isdigit()]
    if head not in PATHWAYS or last not in LEAVES or unknown:
        raise KeyError(f"hook point {name!r} is not in the vocabulary of hooked_vla/hooks/names.py")
    return LEAVES[last]


def same_tensor_as(name: str) -> str | None:
    """The earlier point that holds the very same tensor as `name` when no hook edits in between, if there is one."""
    place = name.rpartition(".")[0]
    if leaf(name) in _NORMED:
        return f"{place}.{_NORMED[leaf(name)]}.hook_normalized"
    number = layer(name)
    if number is None:
        return None
    if leaf(name) == "hook_resid_pre":
        if place.endswith(".channel"):
            return f"{place.removesuffix('channel')}spatial.hook_resid_post"
        start = name.split(".blocks.")[0]
        if place.endswith(".spatial") and number:
            return f"{start}.blocks.{number - 1}.channel.hook_resid_post"
        return f"{start}.blocks.{number - 1}.hook_resid_post" if number else f"{start}.hook_tokens"
    if leaf(name) == "hook_prefix_k":
        return f"vlm.blocks.{number}.attn.hook_rot_k"
    if leaf(name) == "hook_prefix_v":
        return f"vlm.blocks.{number}.attn.hook_v"
    return None


def nearest(name: str, names: Iterable[str], n: int = 3) -> list[str]:
    """The `n` most similar names, best first."""
    return difflib.get_close_matches(name, list(names), n=n, cutoff=0.0)


def unknown_name(name: str, names: Iterable[str]) -> KeyError:
    """The error for a name or pattern that matches no hook point."""
    return KeyError(f"no hook point matches {name!r}; nearest: {', '.join(nearest(name, names))}")


def resolve(names_filter: Any, names: Sequence[str]) -> list[str]:
    """The hook points that a filter selects, in the model's order, each once.

    names_filter: None (all), a name, a glob ("vlm.blocks.*.hook_resid_post"; "*" also crosses dots), a compiled
    regular expression (full match), a callable name -> bool, or any sequence of these (a NamesFilter).
    Raises KeyError naming a request that selects nothing, with the three nearest names; TypeError for anything
    that is not a filter.
    """
    if names_filter is None:
        return list(names)
    chosen = _select(names_filter, names)
    return [name for name in names if name in chosen]


def _select(names_filter: Any, names: Sequence[str]) -> set[str]:
    if names_filter is None:
        return set(names)
    if isinstance(names_filter, str):
        if names_filter in names:
            return {names_filter}
        chosen = {name for name in names if fnmatch.fnmatchcase(name, names_filter)}
        if not chosen:
            raise unknown_name(names_filter, names)
        return chosen
    if isinstance(names_filter, re.Pattern):
        chosen = {name for name in names if names_filter.fullmatch(name)}
        if not chosen:
            raise unknown_name(names_filter.pattern, names)
        return chosen
    if isinstance(names_filter, Iterable):
        return set().union(*(_select(part, names) for part in names_filter))
    if callable(names_filter):
        chosen = {name for name in names if names_filter(name)}
        if not chosen:
            raise KeyError(f"the callable filter {names_filter!r} selects none of the {len(names)} hook points")
        return chosen
    raise TypeError(
        "a filter is None, a name, a glob, a compiled regex, a callable, or a sequence of these; "
        f"got {type(names_filter).__name__}"
    )
