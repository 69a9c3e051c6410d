# %% [markdown]
# # Find what the instruction does
#
# **Question.** By which way does the instruction reach the actions, and does the policy need that way to do its task?
#
# [Cache and patch](cache_and_patch.ipynb) looked at one scene. Here are six scenes in one batch.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from hooked_vla import HookedVLA, Observation
from hooked_vla.analysis.patching import activation_patching
from hooked_vla.interventions import Ablate, EditArm
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.sweep import run_rollouts
from hooked_vla.rollouts.tabletop import TabletopEnv

torch.set_grad_enabled(False)
model = HookedVLA.from_pretrained("smolvla-tabletop")
env = TabletopEnv("goal", "red-orange", cameras=("top", "wrist"))
scenes = [env.reset(seed=seed)[0] for seed in range(6)]


def told(instruction):
    images = {camera: np.stack([scene["pixels"][camera] for scene in scenes]) for camera in ("top", "wrist")}
    return Observation(images, np.stack([scene["state"] for scene in scenes]), [instruction] * len(scenes))


one, other = told("put the red block on the orange pad"), told("put the blue block on the cyan pad")
noise = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(0))

# %% [markdown]
# ## Which tokens carry it
#
# Every row of the batch is a pair of runs, which differ in the instruction alone.

# %%
segments = ["language", "image:top", "image:wrist", "state"]
sweep = activation_patching(model, one, other, "vlm.blocks.*.hook_resid_pre", segments, noise=noise)
found = sweep.table.groupby(["layer", "segment"]).effect.agg(["mean", "min", "max"]).unstack()

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for i, segment in enumerate(segments):
    mean, low, high = (found[what][segment].to_numpy() for what in ("mean", "min", "max"))
    at = np.arange(4) + 0.08 * (i - 1.5)
    axis.errorbar(at, mean, [mean - low, high - mean], marker="o", capsize=3, linestyle="none", label=segment)
axis.set_xticks(range(4), [f"before\nblock {i}" for i in range(4)])
axis.set_ylabel("recovery: mean, least, most\nof six scenes")
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# In every scene the instruction decides through language tokens before block 0 and through the top camera's tokens
# after it. Before block 3 patching one block's stream does little: by then the expert has read keys and values of the
# earlier blocks, and the patch comes too late for those.
#
# ## By which way
#
# If image tokens take the goal from language tokens, they have to attend to them. So that attention is cut: the
# weights of image queries on language keys become 0. What is asked is how much of the difference between the two
# instructions is left, with the cut in both runs. The control cuts what image tokens read from the state token.


# %%
def cut(blocks, keys, heads=None):
    return Ablate(f"vlm.blocks.{blocks}.attn.hook_pattern", "zero", tokens="image:*", keys=keys, heads=heads)


def chunks(edits):
    return [model(obs, noise, edits=edits).normalized.flatten(1) for obs in (one, other)]


whole = chunks([])
apart = (whole[0] - whole[1]).norm(dim=1)


def difference_left(edit):
    first, second = chunks([edit])
    return (first - second).norm(dim=1) / apart


edits = {f"block 0, head {head}": cut(0, "language", heads=head) for head in range(4)}
edits |= {f"block {block}": cut(block, "language") for block in range(3)}
edits |= {"all blocks": cut("*", "language"), "state, all blocks": cut("*", "state")}
left = {name: difference_left(edit) for name, edit in edits.items()}

figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for i, values in enumerate(left.values()):
    axis.plot(values, [i] * len(values), "o", color="tab:gray", alpha=0.5)
    axis.plot(values.mean(), i, "|", color="tab:orange", markersize=16, markeredgewidth=3)
axis.set_yticks(range(len(left)), list(left))
axis.invert_yaxis()
axis.set_xlim(left=0)
axis.set_xlabel("difference between instructions that is left\n(a dot a scene, bar: mean)")
plt.show()

# %% [markdown]
# A single head's cut leaves nearly everything. The cut in block 0 leaves a good half on the mean, with large
# differences between scenes; blocks 1 and 2 add nothing to it, and cutting all blocks takes away no more than cutting
# block 0. So the way from words to image tokens is in block 0, several heads share it, and it is not the only one:
# what is left reaches the actions otherwise, for instance through language tokens that have read the images, and that
# the expert reads.
#
# ## Does the policy need it?
#
# So far one chunk of actions. Now it acts, with and without the cut, from the same starts with the same noise. The
# control cuts what image tokens read of the state in all blocks.

# %%
arms = [BASELINE, EditArm("words cut", [edits["all blocks"]]), EditArm("state cut", [edits["state, all blocks"]])]
done = run_rollouts(model, "goal", episodes=6, seed=900_000, arms=arms)
for name, arm in done.summary.items():
    rate, (low, high) = arm.overall, arm.overall.interval
    print(f"{name:10} {rate.successes} of {rate.episodes} succeed, 95 % interval {low:.0%} to {high:.0%}")

# %% [markdown]
# ## What this shows, and what it does not
#
# - Attention from image tokens to language tokens in block 0 carries part of what an instruction changes in the first
#   chunk. That half of the difference is left does not mean that the actions are half right: in closed loop nearly all
#   episodes fail under the cut, and none fails when the state is cut instead.
# - Zeroed weights are not what the model was trained with: some of the loss may come from being unusual rather than
#   from missing words. The cut of the state token, which is one token instead of nine, is a weak control for that; one
#   that replaces values by those of another instruction (a patch) stays closer to what the model knows.
# - Six episodes have wide intervals, which is why they are printed. `hooked-vla experiment run E3 --model
#   smolvla-tabletop --out DIR` takes more, with every control; see [its
#   report](../results/E3/smolvla-tabletop/report.md).
# - This is a small policy, trained on one table. `model` may be any other: no line above knows which it is, but for
#   the names of its cameras.
