# %% [markdown]
# # Cache and patch
#
# **Question.** Two runs of a policy see the same scene and differ in nothing but the instruction. Where inside the
# model is what makes them act differently?
#
# The policy is a small SmolVLA that comes with the package and acts on a simulated tabletop ([how well](../zoo.md)).
# You need `pip install "hooked-vla[analysis]"`, and no GPU.

# %%
import matplotlib.pyplot as plt
import torch

from hooked_vla import HookedVLA
from hooked_vla.analysis.metrics import recovery, relative_l2
from hooked_vla.analysis.patching import activation_patching
from hooked_vla.interventions import Patch
from hooked_vla.rollouts.suites import observation
from hooked_vla.rollouts.tabletop import TabletopEnv

torch.set_grad_enabled(False)
model = HookedVLA.from_pretrained("smolvla-tabletop")

# %% [markdown]
# The first observation of a scene, with either instruction. The policy draws noise that its action expert turns into
# actions; both runs get the same, so that whatever differs between them comes from the instruction.

# %%
env = TabletopEnv("goal", "red-orange", cameras=("top", "wrist"))
clean, corrupted = (observation(env.reset(seed=7, options={"task": task})[0]) for task in ("red-orange", "blue-cyan"))
noise = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))  # [batch step d_action]

figure, axes = plt.subplots(1, 2, figsize=(6, 3))
for axis, camera in zip(axes, clean.images, strict=True):
    axis.imshow(clean.images[camera])
    axis.set_title(camera)
    axis.axis("off")
plt.show()
print(clean.instruction, "/", corrupted.instruction)

# %% [markdown]
# ## Cache
#
# `run_with_cache` returns the actions and the activations whose names match. A cached tensor is a tensor that knows
# its axes and which of its positions are which tokens.

# %%
actions, cache = model.run_with_cache(clean, ["vlm.*.hook_resid_pre", "expert.*.hook_resid_pre"], noise)
print(cache)
for name in ("vlm.blocks.0.hook_resid_pre", "expert.blocks.0.hook_resid_pre"):
    print(name, cache[name].axes, tuple(cache[name].shape))
print("language tokens:", tuple(cache["vlm.blocks.0.hook_resid_pre"].segment("language").shape))
print("all segments:", model.segments(model.prepare(clean))["vlm"].spans())

# %% [markdown]
# The expert's tensor has a leading `denoise` axis: it runs ten times for one chunk of actions.
#
# ## Patch
#
# A patch gives some tokens of one run the values that they had in another. Here the corrupted run gets the clean run's
# language tokens where they enter block 0. `recovery` is 0 for actions of the corrupted run and 1 for the clean run's.

# %%
site = "vlm.blocks.0.hook_resid_pre"
good, bad = model(clean, noise).normalized, model(corrupted, noise).normalized


def effect(patch):
    return recovery(model(corrupted, noise, edits=[patch]).normalized, bad, good).item()


print("language tokens of the clean run:", round(effect(Patch(site, cache[site], tokens="language")), 4))
print("its image tokens:", round(effect(Patch(site, cache[site], tokens="image:*")), 4))

# %% [markdown]
# That much is bound to be: the runs differ in the instruction, which enters here. It is a check of the method, not a
# finding. Two more checks say what "no effect" looks like. A run that is patched with its own values must keep its
# bits, and the same input with other noise says how far actions go by chance.

# %%
_, own = model.run_with_cache(corrupted, site, noise)
unchanged = model(corrupted, noise, edits=[Patch(site, own[site], tokens="language")]).normalized
print("patched with its own values, bit for bit the same:", torch.equal(unchanged, bad))
other = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(1))
print(
    "other noise, as a part of the difference:",
    round(relative_l2(model(corrupted, other).normalized, bad, good).item(), 3),
)

# %% [markdown]
# ## Patch everywhere
#
# One call patches each site and segment by itself, many of them as rows of one batch.

# %%
sweep = activation_patching(model, clean, corrupted, "vlm.blocks.*.hook_resid_pre", noise=noise)
sweep.figure(title="recovery of the clean run's actions")

# %% [markdown]
# Before block 0 it is the language tokens. One block later it is the image tokens of the top camera, and language
# tokens have next to no effect any more: the block has already written the goal where the objects are.
#
# ## A control
#
# An effect at the image tokens could mean that any change of that size there would do. So the same tokens are pushed
# in random directions, each token as far as the patch had moved it.

# %%
generator = torch.Generator().manual_seed(0)
names = [f"vlm.blocks.{i}.hook_resid_pre" for i in range(4)]
_, donor = model.run_with_cache(clean, names, noise)
_, base = model.run_with_cache(corrupted, names, noise)
rows = []
for name in names:
    moved = (donor[name] - base[name]).norm(dim=-1, keepdim=True)
    for segment in ("image:top", "language"):
        pushed = []
        for _ in range(3):
            direction = torch.randn(base[name].shape, generator=generator)
            source = base[name] + moved * direction / direction.norm(dim=-1, keepdim=True)
            pushed.append(effect(Patch(name, source, tokens=segment)))
        rows.append((name, segment, effect(Patch(name, donor[name], tokens=segment)), max(pushed, key=abs)))

figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for k, (label, color) in enumerate([("patch", "tab:orange"), ("random, the largest of three", "tab:gray")]):
    places = [i + 0.4 * k - 0.2 for i in range(len(rows))]
    axis.bar(places, [row[2 + k] for row in rows], 0.4, label=label, color=color)
axis.set_xticks(range(len(rows)), [f"block {row[0].split('.')[2]}\n{row[1]}" for row in rows], fontsize=8)
axis.set_ylabel("recovery")
axis.legend()
plt.show()

# %% [markdown]
# At the image tokens random pushes of the same size do nothing: there the patch's effect is the patch's. At the
# language tokens of block 0 one of three random pushes goes nearly as far as the patch: words that are spoiled change
# the actions too, and here they happen to change towards the clean ones. Without the control, the 1.0 beside it would
# have looked like a finding.
#
# ## What this shows, and what it does not
#
# In this scene and for this pair of instructions, what decides the actions moves from language tokens to image tokens
# within block 0, and at the image tokens it is specific.
#
# - It is one scene and one pair. [The next tutorial](find_the_instruction.ipynb) takes several, and asks by which way.
# - It is one chunk of actions, planned from the first observation. A chunk that is brought back is not yet a task that
#   is done: for that a policy has to act. `hooked-vla experiment run E3` does it in closed loop, and [its
#   report](../results/E3/smolvla-tabletop/report.md) finds much less restored there.
# - Patching *all* tokens of a block replaces everything that the rest of the model sees. The actions are then the
#   donor's whatever the model does: *replay*, which the table of a sweep marks (`sweep.table.replay`).
