# %% [markdown]
# # Add a model
#
# **Question.** What does a network need so that caches, edits and analyses work on it, and how does one know that they
# tell the truth about it?
#
# Here a new policy is made in a notebook: image patches, words, proprioception and a few learned tokens go through a
# transformer, and the learned ones become a chunk of actions. [Adding a model](../add_a_model.md) says what more a
# family of the package has (published checkpoints, recorded parity).
#
# ## The parts
#
# Components bring their hook points. What is new declares its own where it is built, and uses them on the lines that
# make the values. Their names are TransformerLens's, or stand in [the vocabulary](../../hooked_vla/hooks/names.py).

# %%
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import nn

from hooked_vla import HookedVLA, Observation, Segments
from hooked_vla.components.action_head import LinearHead
from hooked_vla.components.attention import SelfAttention
from hooked_vla.components.block import Block
from hooked_vla.components.mlp import MLP
from hooked_vla.components.norm import LayerNorm
from hooked_vla.components.vit import ViT
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import ACTION, LANGUAGE, STATE, image_segment
from hooked_vla.models.network import Network
from hooked_vla.policy import Processor
from hooked_vla.spec import DecoderSpec, FeatureSpec, ModelSpec, VisionSpec

D, CHUNK, CAMERAS = 32, 4, ("top", "wrist")


class MaskedAttention(SelfAttention):
    """Self-attention that leaves out padding."""

    def forward(self, x, mask):
        return self.attend(self.queries(x), *self.keys_values(x), mask=mask)


class Prefix(nn.Module):
    """Tokens of images, words, state and actions, and a transformer over them."""

    def __init__(self, spec):
        super().__init__()
        self.d_model = spec.d_model
        self.embed = nn.Embedding(spec.d_vocab, D)
        self.state_proj = nn.Linear(4, D)
        self.actions = nn.Parameter(torch.randn(CHUNK, D))
        attention = [MaskedAttention(D, spec.n_heads, spec.n_kv_heads, spec.d_head, bias=True) for _ in range(3)]
        self.blocks = nn.ModuleList(
            Block(D, LayerNorm(D, spec.eps), attn, LayerNorm(D, spec.eps), MLP(D, spec.d_mlp, spec.act))
            for attn in attention
        )
        self.hook_embed_state = HookPoint("batch 1 d_model", stream="vlm.state")
        self.hook_tokens = HookPoint("batch seq d_model")

    def forward(self, image_tokens, inputs, valid):
        state = self.hook_embed_state(self.state_proj(inputs.state)[:, None])
        actions = self.actions.expand(len(state), -1, -1)
        x = self.hook_tokens(torch.cat([image_tokens, self.embed(inputs.tokens), state, actions], dim=1))
        mask = torch.zeros(valid.shape).masked_fill(~valid, -torch.inf)[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        return x


# %% [markdown]
# ## The network
#
# Its children are the pathways. Besides running, it says three things about itself: how often its expert runs, which
# positions are which tokens, and which points no action depends on.


# %%
class Toy(Network):
    def __init__(self, spec):
        super().__init__()
        self.vision, self.vlm = ViT(spec.vision), Prefix(spec.vlm)
        self.head = LinearHead(D, CHUNK, d_action=4)

    n_denoise_steps = 1
    dead_ends = ()

    def layout(self, inputs):
        patches = (inputs.images.shape[-1] // self.vision.patch_size) ** 2
        spans = [(image_segment(camera), patches) for camera in inputs.cameras]
        seen = inputs.image_mask.repeat_interleave(patches, dim=1)
        valid = torch.cat([seen, inputs.token_mask, torch.ones(inputs.batch_size, 1 + CHUNK, dtype=torch.bool)], dim=1)
        return patches, [*spans, (LANGUAGE, inputs.tokens.shape[1]), (STATE, 1), (ACTION, CHUNK)], valid

    def segments(self, inputs):
        patches, spans, valid = self.layout(inputs)
        rows = torch.arange(len(inputs.cameras)).repeat(inputs.batch_size)[:, None].expand(-1, patches)
        return {
            "vision": Segments(tuple(map(image_segment, inputs.cameras)), rows, row_axis="image"),
            "vlm": Segments.from_spans(spans, inputs.batch_size, valid),
            "vlm.state": Segments.from_spans([(STATE, 1)], inputs.batch_size),
            "head": Segments.from_spans([(ACTION, CHUNK)], inputs.batch_size),
        }

    def sample_actions(self, inputs, draws, run):
        _, _, valid = self.layout(inputs)
        image_tokens = self.see(inputs).flatten(1, 2)
        return self.head(self.vlm(image_tokens, inputs, valid)[:, -CHUNK:])


# %% [markdown]
# ## The spec
#
# What the model is, as data. `features` says what the robot's side looks like; the processor reads it.


# %%
@dataclass(frozen=True, kw_only=True)
class ToySpec(ModelSpec):
    vision: VisionSpec
    vlm: DecoderSpec


class ToyProcessor(Processor):
    @staticmethod
    def state_width(spec):
        return spec.features.d_state


spec = ToySpec(
    name="toy", family="toy", config_type="toy", description="a transformer over patches, words and state", paper="",
    licence="Apache-2.0", source="this page", n_parameters=0, checkpoints=(), keys={},
    vision=VisionSpec(image_size=32, patch_size=8, d_model=D, n_layers=1, n_heads=4, d_mlp=64, act="gelu", eps=1e-5),
    vlm=DecoderSpec(d_model=D, n_layers=3, n_heads=4, n_kv_heads=4, d_head=8, d_mlp=64, act="gelu", eps=1e-5,
                    rope_base=1.0, d_vocab=300),
    features=FeatureSpec(cameras=CAMERAS, d_state=4, d_action=4, resize=(32, 32), empty_cameras=0, n_action_steps=CHUNK,
                         max_text=64, pad_text="longest", tokenizer="bytes"),
)  # fmt: skip
torch.manual_seed(0)
model = HookedVLA(spec, Toy(spec).eval(), ToyProcessor.from_files(spec, None, {}, {})).requires_grad_(False)

generator = torch.Generator().manual_seed(0)
images = {camera: torch.randint(0, 256, (2, 32, 32, 3), generator=generator, dtype=torch.uint8) for camera in CAMERAS}
obs = Observation(images, torch.randn(2, 4, generator=generator), ["put the red block on the tray", "lift it"])
print(len(model.hook_points), "hook points;", tuple(model(obs).chunk.shape), "actions")
for name in ("vision.blocks.0.attn.hook_pattern", "vlm.hook_tokens", "vlm.blocks.2.hook_resid_post"):
    site = model.hook_points[name]
    print(f"{name}: {site.shape}, {site.meaning}")

# %% [markdown]
# ## Does it tell the truth?
#
# Four properties, which `tests/hooks/test_every_point.py` checks for every model of the package.

# %%
before = model(obs).chunk
_, cache = model.run_with_cache(obs)

# every point fires with its declared shape
for name, site in model.hook_points.items():
    shape = cache[name].shape
    assert all(said == size for said, size in zip(site.shape, shape, strict=True) if isinstance(said, int)), name

# the residual stream adds up, to the bit
for i in range(3):
    block = f"vlm.blocks.{i}"
    assert torch.equal(
        cache[f"{block}.hook_resid_pre"] + cache[f"{block}.hook_attn_out"], cache[f"{block}.hook_resid_mid"]
    )

# a padded token changes nothing
padding = model.segments(model.prepare(obs))["vlm"].mask("pad")
moved = model.run_with_hooks(obs, [("vlm.hook_tokens", lambda value, hook: value + 9 * padding[..., None])])
assert torch.equal(moved.chunk, before)


# editing a point changes the actions
def moves(name):
    def edit(value, hook):
        return value + 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))

    # listening to attention computes it in the open, whose last bits differ
    return not torch.allclose(model.run_with_hooks(obs, [(name, edit)]).chunk, before, atol=1e-5)


print("points that no action depends on:", [name for name in model.hook_points if not moves(name)])

# %% [markdown]
# Every point counts. Would the check notice one that does not? Here is the same network with a point that shows a
# value that nothing goes on with.


# %%
class WithDeadEnd(Toy):
    def __init__(self, spec):
        super().__init__(spec)
        self.vlm.hook_embed_language = HookPoint("batch text d_model", stream="vlm.state")

    def sample_actions(self, inputs, draws, run):
        self.vlm.hook_embed_language(self.vlm.embed(inputs.tokens))  # shown, and then not used
        return super().sample_actions(inputs, draws, run)


torch.manual_seed(0)
careless = HookedVLA(spec, WithDeadEnd(spec).eval(), model.processor).requires_grad_(False)
name = "vlm.hook_embed_language"
edited = careless.run_with_hooks(obs, [(name, lambda value, hook: value + 1)]).chunk
print(
    "declared:", careless.hook_points[name].reaches_action, "- measured:", not torch.equal(edited, careless(obs).chunk)
)

# %% [markdown]
# Declared and measured differ: the check finds it, and `dead_ends = ("vlm.hook_embed_language",)` would be the remedy.
#
# ## What comes with it
#
# Nothing below was written for this model.

# %%
from hooked_vla.analysis.patching import activation_patching

other = Observation(obs.images, obs.state, ["put the tan block on the tray", "push it"])
sweep = activation_patching(model, obs, other, "vlm.blocks.*.hook_resid_pre", noise=[])
table = sweep.table.pivot_table(index="layer", columns="segment", values="effect")

figure, axis = plt.subplots(figsize=(6, 2.2), layout="constrained")
drawn = axis.imshow(table.to_numpy(), cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
axis.set_xticks(range(len(table.columns)), list(table.columns))
axis.set_yticks(range(len(table)), [f"before block {layer}" for layer in table.index])
axis.set_title("random weights: recovery by place", fontsize=9)
figure.colorbar(drawn)
plt.show()

# %% [markdown]
# ## What this shows, and what it does not
#
# The properties say that hooks show and change what the network computes. They do not say that the network is the one
# that somebody published: for that, a tiny checkpoint of the public implementation is recorded, and every module has
# to agree with it to 1e-5. And the heat map is of random weights: it is a picture of the wiring, not of anything
# learned.
