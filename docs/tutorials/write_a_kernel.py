# %% [markdown]
# # Write a kernel
#
# **Question.** An edit that one wants is not there. How is it written so that it says what it computes, runs as one
# pass on a GPU, and is known to be right, on a machine without a GPU?
#
# The example limits the length of tokens: y = x · min(1, limit / ‖x‖) where a mask is True. Tokens outside of the
# mask, and those that are short enough, keep their bits. (Steering with large strengths makes tokens longer than the
# model has ever seen; this is one way to ask whether length or direction did it.)
#
# ## The reference
#
# Plain PyTorch, in float32, and nothing else. It defines the operation; tests and benchmarks import it.

# %%
import os

# before Triton is imported: its kernels then run in Python, on a CPU
os.environ["TRITON_INTERPRET"] = "1"

import matplotlib.pyplot as plt
import torch
import triton
import triton.language as tl

from hooked_vla import HookedVLA
from hooked_vla.rollouts.suites import observation
from hooked_vla.rollouts.tabletop import TabletopEnv

torch.set_grad_enabled(False)


def reference(x, mask, limit):
    """y_t = x_t · min(1, limit / ‖x_t‖) where mask_t. x [n d], mask [n] bool."""
    length = x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=1, keepdim=True)
    shorter = (x * (limit / length)).to(x.dtype)
    return torch.where(mask[:, None] & (length > limit), shorter, x)


# %% [markdown]
# ## The kernel
#
# One program a token, all of its channels in one block. A block has a power of two of places, d need not be one: so
# every load and store has a mask.


# %%
@triton.jit
def limit_kernel(x_ptr, mask_ptr, y_ptr, limit, d, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * d + at, mask=at < d, other=0.0)
    wide = x.to(tl.float32)
    length = tl.sqrt(tl.sum(wide * wide, 0))
    edited = (tl.load(mask_ptr + token) != 0) & (length > limit)
    y = (wide * (limit / length)).to(x.dtype)
    tl.store(y_ptr + token * d + at, tl.where(edited, y, x), mask=at < d)


def fused(x, mask, limit, kernel=limit_kernel):
    # what the kernel forgets to write stays NaN and is seen
    y = torch.full_like(x, torch.nan)
    kernel[(len(x),)](x, mask, y, float(limit), x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return y


# %% [markdown]
# ## Is it right?
#
# Against the reference in float64, at sizes that fill a block and sizes that do not. And since a check that nothing
# can fail shows nothing, beside a kernel with the commonest mistake: no mask on the load.


# %%
@triton.jit
def careless_kernel(x_ptr, mask_ptr, y_ptr, limit, d, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * d + at)
    wide = x.to(tl.float32)
    length = tl.sqrt(tl.sum(wide * wide, 0))
    edited = (tl.load(mask_ptr + token) != 0) & (length > limit)
    y = (wide * (limit / length)).to(x.dtype)
    tl.store(y_ptr + token * d + at, tl.where(edited, y, x), mask=at < d)


def worst(run, d):
    generator = torch.Generator().manual_seed(d)
    # rows follow each other in one larger tensor, so that reading past a row finds the next one
    x = (torch.randn(9, d, generator=generator) * torch.tensor([0.01, 1, 1, 1, 1, 10, 100, 1, 1])[:, None])[:7]
    mask = torch.tensor([True, True, True, False, True, True, True])
    exact = reference(x.double(), mask, 5.0)
    return ((run(x, mask, 5.0) - exact).abs().max() / exact.abs().max()).item()


sizes = [1, 16, 33, 64, 70, 96, 128, 200]
runs = {"reference": reference, "kernel": fused, "careless": lambda *given: fused(*given, kernel=careless_kernel)}
errors = {name: [worst(run, d) for d in sizes] for name, run in runs.items()}
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for name, marker in zip(errors, "os^", strict=True):
    axis.plot([str(d) for d in sizes], [max(error, 1e-9) for error in errors[name]], marker, label=name, alpha=0.8)
axis.axhline(torch.finfo(torch.float32).eps * 8, color="tab:gray", linewidth=1, label="8 roundings of float32")
axis.set_yscale("log")
axis.set_xlabel("channels d (the block has the next power of two)")
axis.set_ylabel("largest error / largest value")
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# The careless kernel is right where d is a power of two, and wrong elsewhere. Models' widths often are powers of two:
# had only those been tried, it would have passed. Bits are checked apart from errors:

# %%
x = torch.randn(8, 70, generator=torch.Generator().manual_seed(0)).half()
mask = torch.arange(8) % 2 == 0
y = fused(x, mask, 5.0)
print("outside of the mask, bit for bit:", torch.equal(y[~mask], x[~mask]))
print("no limit that is reached, bit for bit:", torch.equal(fused(x, mask, 100.0), x))
print("lengths inside:", [round(length, 2) for length in y[mask].float().norm(dim=1).tolist()])

# %% [markdown]
# ## One op, two ways
#
# As a `torch.library` op it goes through `torch.compile`, which then needs to know the shape of what comes out, and no
# more. `hooked_vla.kernels.dispatch.implementation` chooses the way by device: the kernel for GPU tensors, the
# reference elsewhere.

# %%
from hooked_vla.kernels.dispatch import implementation

PATHS = {"reference": lambda: reference, "fused": lambda: fused}


@torch.library.custom_op("tutorial::limit_length", mutates_args=())
def limit_length(x: torch.Tensor, mask: torch.Tensor, limit: float) -> torch.Tensor:
    # an op must not hand back its input
    return implementation("limit_length", PATHS, x)(x, mask, limit).clone()


@limit_length.register_fake
def _(x, mask, limit):
    return torch.empty_like(x)


print(torch.library.opcheck(limit_length, (torch.randn(3, 5), torch.tensor([True, False, True]), 1.0)))

# %% [markdown]
# ## In a policy
#
# Any function of (value, hook) edits a run. Here language tokens of one layer are made no longer than some part of
# their usual length. How far do actions move?

# %%
model = HookedVLA.from_pretrained("smolvla-tabletop")
obs = observation(TabletopEnv("goal", "red-orange", cameras=("top", "wrist")).reset(seed=7)[0])
noise = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
site = "vlm.blocks.0.hook_resid_pre"
actions, cache = model.run_with_cache(obs, site, noise)
usual = cache[site].segment("language").norm(dim=-1).mean().item()


def limited(part):
    def edit(value, hook):
        mask = hook.segments.mask("language").flatten()
        return limit_length(value.flatten(0, 1), mask, part * usual).unflatten(0, value.shape[:2])

    return model.run_with_hooks(obs, [(site, edit)], noise=noise).normalized


for part in (10.0, 1.0, 0.5, 0.1):
    moved = (limited(part) - actions.normalized).norm() / actions.normalized.norm()
    print(f"at most {part} of the usual length: actions move by {moved:.3f} of their own")

# %% [markdown]
# ## What this shows, and what it does not
#
# - The interpreter shows that the kernel computes what it should, reads and writes where it may, and leaves bits
#   alone. It says nothing of speed, and nothing of what the compiler makes of it. `tests/kernels/test_aot.py` compiles
#   the package's kernels for several GPUs; [kernels](../../kernels/README.md) says what else an op needs (arguments
#   checked by name, gradients, every refusal tested).
# - A limit of ten usual lengths moves nothing: that is the floor, to the bit. The smaller ones move actions, which
#   does not say that lengths carry a meaning: the next layer begins with a norm, so that what changes is the tokens'
#   weight against what later layers add.
