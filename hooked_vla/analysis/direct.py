"""Direct action attribution: what each part of the expert's last residual stream does to the actions by itself.

The stream is a sum of what was written to it: the tokens that entered, and each block's attention and MLP. What follows
is a final norm and an action head, both linear once the norm's divisor is held at the value that it has in this run. So
every part has its own share of the prediction, and the shares and a bias add up to it: nothing is left unexplained, and
nothing is said about what a part does through later blocks (direct logit attribution, arXiv 2211.00593, for actions).

>>> found = attribute_actions(model, obs, noise)
>>> found.contributions                # [component step batch chunk d_action], found.labels says which
>>> found.error                        # largest difference of their sum from what the model predicted
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vla.components.action_head import FlowMatchingHead, ForwardFlowHead, LinearHead, ResamplingHead
from hooked_vla.components.domain import DomainLinear, DomainMLP
from hooked_vla.components.norm import AdaLayerNorm, AdaRMSNorm, LayerNorm, OneCentredRMSNorm, RMSNorm, UnitLayerNorm
from hooked_vla.hooks import ActivationCache, HookedModel
from hooked_vla.inputs import ACTION, DomainInputs, EmbodiedInputs, ModelInputs

BIAS, NOISE = "bias", "noise"
# what a block adds to the stream, and the norm that the stream itself then passes in post-norm blocks
_WRITES = (("hook_attn_out", "ln1_post"), ("hook_cross_attn_out", "ln_cross_post"), ("hook_mlp_out", "ln2_post"))


@dataclass(frozen=True, eq=False)
class ActionAttribution:
    """Shares in what an expert predicts, in normalised units.

    labels: the hook point of each part, and "bias" for all that does not depend on the stream. prediction: what the
    model had at `site`: a velocity, clean actions, or the actions. error: largest difference of the sum from it.
    actions: shares in the finished chunk, with "noise" for the starting noise where actions grow from it; None where a
    last step that is not linear (`why_not`) comes between.
    """

    site: str
    labels: tuple[str, ...]
    contributions: Float[Tensor, "component step batch chunk d_action"]
    prediction: Float[Tensor, "step batch chunk d_action"]
    actions: Float[Tensor, "share batch chunk d_action"] | None
    finished: Float[Tensor, "batch chunk d_action"]
    why_not: str

    @property
    def error(self) -> float:
        return float((self.contributions.sum(0) - self.prediction).abs().max())

    @property
    def action_labels(self) -> tuple[str, ...]:
        """Of `actions`. Raises ValueError where there are none, saying why."""
        if self.actions is None:
            raise ValueError(f"no shares in the finished actions: {self.why_not}")
        return self.labels if len(self.actions) == len(self.labels) else (*self.labels, NOISE)


@torch.no_grad()
def attribute_actions(model: HookedModel, obs: Any, noise: Any = None) -> ActionAttribution:
    """The shares of an expert's parts in its predictions for a batch of observations.

    A rectifier in the head is held open where it is open in this run, like the norms' divisors.
    Raises ValueError for a model without an expert of this form, saying what it has instead.
    """
    inputs = model.prepare(obs)
    site, head = _head(model)
    expert, points = model.net.expert, model.points
    blocks = [f"expert.blocks.{i}" for i in range(len(expert.blocks))]
    writes = [(f"{block}.{leaf}", f"{block}.{norm}") for block in blocks for leaf, norm in _WRITES]
    writes = [(name, norm) for name, norm in writes if name in points]
    norms = [norm for _, norm in writes if _has(model.net, norm)] + ["expert.ln_final"]
    norms = [norm for norm in norms if not isinstance(model.net.get_submodule(norm), nn.Identity)]
    wanted = ["expert.hook_tokens", *(name for name, _ in writes), site, "head.hook_actions"]
    wanted += [name for norm in norms for name in _norm_points(norm, points)]
    wanted += [name for name in ("expert.hook_out", "expert.hook_noisy_actions") if name in points]
    _, cache = model.run_with_cache(inputs, list(dict.fromkeys(wanted)), noise)

    stream = _Stream(cache)
    stream.add("expert.hook_tokens")
    for name, norm in writes:
        stream.add(name)
        if norm in norms:
            stream.apply(*_frozen(model.net.get_submodule(norm), norm, cache, stream.positions))
    if norms[-1] == "expert.ln_final":
        stream.apply(*_frozen(expert.ln_final, norms[-1], cache, stream.positions))
    for linear, bias in head(inputs, cache, stream.positions):
        stream.apply(linear, bias)
    labels, parts = (*stream.parts, BIAS), torch.stack([*stream.parts.values(), stream.bias])
    actions, why_not = _finished(model, parts, cache)
    return ActionAttribution(site, labels, parts, _stepped(cache, site), actions, cache["head.hook_actions"], why_not)


Linear = Callable[[Tensor], Tensor]


class _Stream:
    """The residual stream of the action tokens in parts, in float64: each step of it acts on every part alike."""

    def __init__(self, cache: ActivationCache) -> None:
        self.cache = cache
        self.parts: dict[str, Float[Tensor, "step batch token d"]] = {}
        self.bias: Tensor = torch.zeros(())
        segments = cache.segments["expert"]
        at = segments.positions(ACTION)
        assert all(torch.equal(each, at[0]) for each in at)
        self.positions = at[0]

    def add(self, name: str) -> None:
        """What a hook point holds is added to the stream."""
        self.parts[name] = _stepped(self.cache, name)[:, :, self.positions].double()

    def apply(self, linear: Linear, bias: Tensor) -> None:
        """stream -> linear(stream) + bias."""
        whole = self.bias if self.bias.ndim else torch.zeros_like(next(iter(self.parts.values())))
        self.parts = {name: linear(part) for name, part in self.parts.items()}
        self.bias = linear(whole) + bias


def _stepped(cache: ActivationCache, name: str) -> Tensor:
    """A cached tensor with a leading step axis."""
    value = cache[name]
    return value.detach() if cache.entries[value.site].steps is not None else value.detach()[None]


def _has(net: nn.Module, path: str) -> bool:
    parent, _, leaf = path.rpartition(".")
    return hasattr(net.get_submodule(parent), leaf)


def _norm_points(norm: str, points: Mapping[str, Any]) -> list[str]:
    return [
        f"{norm}.{leaf}" for leaf in ("hook_scale", "hook_ada_scale", "hook_ada_shift") if f"{norm}.{leaf}" in points
    ]


def _frozen(
    norm: nn.Module, path: str, cache: ActivationCache, positions: Tensor
) -> tuple[Linear, Float[Tensor, "..."]]:
    """A norm as the affine map that it is while its divisor is held: y = (x - mean) / divisor · gain + bias."""
    divisor = _stepped(cache, f"{path}.hook_scale").double()
    if divisor.shape[2] != len(positions):
        divisor = divisor[:, :, positions]
    centred = isinstance(norm, LayerNorm | UnitLayerNorm)
    gain, bias = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if isinstance(norm, AdaLayerNorm | AdaRMSNorm):
        gain = 1 + _stepped(cache, f"{path}.hook_ada_scale").double()[:, :, None]
        bias = _stepped(cache, f"{path}.hook_ada_shift").double()[:, :, None]
    elif isinstance(norm, OneCentredRMSNorm):
        gain = 1 + norm.weight.double()
    elif isinstance(norm, RMSNorm):
        gain = norm.weight.double()
    elif isinstance(norm, LayerNorm):
        gain, bias = norm.weight.double(), norm.bias.double()
    elif not isinstance(norm, UnitLayerNorm):
        raise ValueError(f"{path} is a {type(norm).__name__}, which is not known as a frozen linear map")

    def linear(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if centred else x
        return x / divisor.to(x.device) * gain.to(x.device)

    return linear, bias


HeadSteps = Callable[[ModelInputs, ActivationCache, Tensor], list[tuple[Linear, Tensor]]]


def _head(model: HookedModel) -> tuple[str, HeadSteps]:
    """Where an expert's prediction is seen, and the linear maps from its normed stream to it."""
    net, points = model.net, model.points
    expert = getattr(net, "expert", None)
    if expert is None or not hasattr(expert, "blocks") or "expert.hook_tokens" not in points:
        ways = sorted({point.pathway for point in points.values()})
        raise ValueError(
            f"direct attribution needs an action expert that is a transformer with a residual stream; the model has "
            f"the pathways {ways}. Actions said as tokens are read with lens.logit_lens"
        )
    plain, by_domain = getattr(expert, "action_out_proj", None), getattr(expert, "action_out", None)
    decoder, last = getattr(expert, "action_decoder", None), getattr(net, "head", None)
    if isinstance(plain, nn.Linear):
        return "expert.hook_velocity", lambda inputs, cache, at: [_linear(plain)]
    if isinstance(by_domain, DomainLinear):
        return "expert.hook_clean_actions", lambda inputs, cache, at: [_domain_linear(by_domain, inputs)]
    if isinstance(decoder, DomainMLP) and isinstance(getattr(expert, "out_proj", None), nn.Linear):
        return "expert.hook_velocity", lambda inputs, cache, at: _decoder(expert.out_proj, decoder, inputs, cache, at)
    if isinstance(last, LinearHead):
        return "head.hook_actions", lambda inputs, cache, at: [_linear(last.proj)]
    raise ValueError(
        f"direct attribution needs an action head that is linear, or rectified once, after the expert's last norm; "
        f"this one is a {type(last).__name__} behind a {type(expert).__name__}"
    )


def _linear(layer: nn.Linear) -> tuple[Linear, Tensor]:
    weight = layer.weight.double()
    bias = torch.zeros((), dtype=torch.float64) if layer.bias is None else layer.bias.double()
    return lambda x: x @ weight.T, bias


def _domain_linear(layer: DomainLinear, inputs: ModelInputs) -> tuple[Linear, Tensor]:
    assert isinstance(inputs, DomainInputs | EmbodiedInputs)
    domain = inputs.domain if isinstance(inputs, DomainInputs) else inputs.embodiment
    weight = layer.W[domain].view(-1, layer.d_in, layer.d_out).double()
    return lambda x: torch.einsum("sbti,bio->sbto", x, weight), layer.b[domain].double()[:, None]


def _decoder(
    out_proj: nn.Linear, decoder: DomainMLP, inputs: ModelInputs, cache: ActivationCache, positions: Tensor
) -> list[tuple[Linear, Tensor]]:
    """A projection, and two linear maps with a rectifier between them."""
    first, bias = _domain_linear(decoder.layer1, inputs)
    out = _stepped(cache, "expert.hook_out")[:, :, positions].double()
    open_ = (first(out) + bias > 0).double()
    return [
        _linear(out_proj),
        (first, bias),
        (lambda x: x * open_, torch.zeros(())),
        _domain_linear(decoder.layer2, inputs),
    ]


def _finished(
    model: HookedModel, parts: Float[Tensor, "component step batch chunk d_action"], cache: ActivationCache
) -> tuple[Float[Tensor, "share batch chunk d_action"] | None, str]:
    """The parts' shares in the finished chunk, which is linear in the predictions of all steps."""
    head, n = getattr(model.net, "head", None), parts.shape[1]
    if isinstance(head, FlowMatchingHead | ForwardFlowHead):
        sign = -1 if isinstance(head, FlowMatchingHead) else 1
        start = cache["expert.hook_noisy_actions"].detach()[0].double()
        return torch.cat([sign / n * parts.sum(1), start[None]]), ""
    if isinstance(head, ResamplingHead):
        if head.grippers:
            return None, f"the head squashes the gripper channels {list(head.grippers)}"
        # each step starts from the last prediction, and the last one is what comes out
        return parts[:, -1], ""
    if isinstance(head, LinearHead):
        return parts[:, 0], ""
    return None, f"how a {type(head).__name__} makes actions of predictions is not known"


def strengths(found: ActionAttribution) -> Float[Tensor, "component d_action"]:
    """Root mean square of each part's shares, over steps, rows and steps of the chunk: a summary to rank parts by."""
    return rearrange(found.contributions, "c s b t d -> c d (s b t)").square().mean(-1).sqrt()
