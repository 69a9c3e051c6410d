# %% [markdown]
# # Steer a feature
#
# **Question.** A sparse autoencoder found features in a policy. Which of them say what the policy was told, which of
# them does it act upon, and are these the same?
#
# The autoencoder comes with the package. It was trained on all tokens of one layer while the policy acted; the site is
# the one at which [patching](find_the_instruction.ipynb) finds the instruction in tokens of the top camera's image.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from hooked_vla import HookedVLA, Observation
from hooked_vla.analysis.metrics import recovery
from hooked_vla.interventions import EditArm, Patch, SAEFeatureEdit
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.sweep import run_rollouts
from hooked_vla.rollouts.tabletop import TabletopEnv
from hooked_vla.sae.autoencoder import SparseAutoencoder

torch.set_grad_enabled(False)
model = HookedVLA.from_pretrained("smolvla-tabletop")
sae = SparseAutoencoder.from_pretrained("smolvla-tabletop/vlm.blocks.1.hook_resid_post")
site, TOP = sae.config.site, "image:top"
print(sae)

# %% [markdown]
# Sixteen scenes, each with four instructions, which differ in the block's colour alone. Where every block stands on
# the grid of the camera's 4 × 4 tokens is known from the simulator.

# %%
COLOURS, N = ("red", "green", "blue", "yellow"), 16
env = TabletopEnv("goal", "red-orange", cameras=("top", "wrist"))
scenes, cells = [], {colour: [] for colour in COLOURS}
for seed in range(N):
    scenes.append(env.reset(seed=seed)[0])
    mask = env.object_mask("top")
    for colour in COLOURS:
        row, column = (int(each.mean()) * 4 // len(mask) for each in np.where(mask == env.object_names.index(colour)))
        cells[colour].append(4 * row + column)


def told(colour):
    images = {camera: np.stack([scene["pixels"][camera] for scene in scenes]) for camera in ("top", "wrist")}
    return Observation(
        images, np.stack([scene["state"] for scene in scenes]), [f"put the {colour} block on the cyan pad"] * N
    )


noise = torch.randn(N, 8, 4, generator=torch.Generator().manual_seed(0))
features, chunks, caches = {}, {}, {}
for colour in COLOURS:
    actions, caches[colour] = model.run_with_cache(told(colour), site, noise)
    chunks[colour] = actions.normalized
    features[colour] = sae.encode(caches[colour][site].segment(TOP))  # [scene token feature]

reconstructed = sae(caches["red"][site].segment(TOP))
own = model(told("red"), noise, edits=[Patch(site, reconstructed, tokens=TOP)]).normalized
lost = (own - chunks["red"]).norm() / (chunks["blue"] - chunks["red"]).norm()
print(f"active features a token: {(features['red'] > 0).float().sum(-1).mean():.1f} of {sae.config.n_features}")
print(f"actions with these tokens reconstructed: off by {lost:.3f} of the difference between red and blue")

# %% [markdown]
# The last number is a floor for what follows: the autoencoder misses little that the actions depend on.
#
# ## Which feature says "red"?
#
# For every feature: in how many pairs of runs is its largest value higher where red was asked for than where another
# colour was (1: always, 0.5: chance)? The best of a thousand features is good by luck too, so that it is chosen on
# eight scenes and judged on the other eight.

# %%
strongest = {colour: values.amax(1) for colour, values in features.items()}


def tells_red(choose):
    positive = strongest["red"][choose]
    negative = torch.cat([strongest[colour][choose] for colour in COLOURS[1:]])
    higher = positive[:, None] - negative
    return ((higher > 0).float() + 0.5 * (higher == 0).float()).mean((0, 1))


named = int(tells_red(slice(0, 8)).argmax())
print(f"feature {named} tells red in {tells_red(slice(0, 8))[named]:.0%} of the pairs of scenes that it was chosen on,")
print(f"and in {tells_red(slice(8, N))[named]:.0%} of the others")

# %% [markdown]
# ## Which feature do actions depend on?
#
# From runs told *blue* to runs told *red*, every feature changes at some tokens. What each change does to the actions
# is estimated from one backward pass (attribution): its size, times the gradient along its decoder row.

# %%
base, donor = chunks["blue"], chunks["red"]


def toward_red(actions):
    return recovery(actions.normalized, base, donor).sum()


with torch.enable_grad():
    _, graph = model.run_with_cache(told("blue"), site, noise, incl_bwd=toward_red)
positions = model.segments(model.prepare(told("blue")))["vlm"].positions(TOP)[0]
rows = sae.splice().w_dec  # in the model's own units
slopes = graph[f"{site}_grad"].detach()[:, positions] @ rows.T
estimate = ((features["red"] - features["blue"]) * slopes).sum(1).mean(0)
used = int(estimate.argmax())
for feature in (used, named):
    reads = tells_red(slice(0, N))[feature]
    print(f"feature {feature}: estimated part of the way to red {estimate[feature]:.3f}, tells red {reads:.2f}")

# %% [markdown]
# They are two. The one that tells red best is hardly used, and the one that is used does not tell red. Where on the
# image is it strongest?

# %%
figure, axes = plt.subplots(2, 4, figsize=(8, 4.2), layout="constrained")
for axis, colour, scene in [(axes[i, j], COLOURS[j], i) for i in range(2) for j in range(4)]:
    axis.imshow(scenes[scene]["pixels"]["top"], extent=(0, 4, 4, 0))
    axis.imshow(
        features[colour][scene, :, used].view(4, 4).numpy(), extent=(0, 4, 4, 0), cmap="Reds", alpha=0.6, vmin=0
    )
    axis.set_title(f"told {colour}", fontsize=9)
    axis.set_axis_off()


def share_on(places, colour):
    """Share of scenes in which the place is the token that the block of this colour stands on."""
    return (places == torch.tensor(cells[colour])).float().mean().item()


asked, unasked = [], []
for colour in COLOURS:
    places = features[colour][..., used].argmax(1)
    asked.append(share_on(places, colour))
    unasked += [share_on(places, other) for other in COLOURS if other != colour]
print(f"feature {used} is strongest on the token of the block that was asked for in {np.mean(asked):.0%} of the runs,")
print(f"on that of a given other block in {np.mean(unasked):.0%} (one token of 16: 6%)")

# %% [markdown]
# It looks like a marker at or beside the block: *what to take is here*, whichever colour it has. That is a hypothesis
# about what it does, so it is tested by doing: in runs told *blue*, the marker is taken from where it is and put where
# the red block stands, at several strengths. Controls: the same put at a random place; and the feature that tells red
# put where the red block is.

# %%
apart = torch.tensor(cells["red"]) != torch.tensor(cells["blue"])
usual = features["blue"][..., used].amax(1).mean()
elsewhere = torch.randint(0, 16, (N,), generator=torch.Generator().manual_seed(0))


def moved(feature, places, strength):
    wanted = torch.zeros(N, 16)
    wanted[torch.arange(N), places] = strength * usual
    change = (wanted - features["blue"][..., feature])[..., None] * rows[feature]
    patch = Patch(site, caches["blue"][site].segment(TOP) + change, tokens=TOP)
    return recovery(model(told("blue"), noise, edits=[patch]).normalized, base, donor)[apart]


strengths = (0, 0.5, 1, 1.5, 2)
red_places = torch.tensor(cells["red"])
curves = {
    f"{used}, to the red block": [moved(used, red_places, each) for each in strengths],
    f"{used}, to a random place": [moved(used, elsewhere, each) for each in strengths],
    f"{named} (tells red), to the red block": [moved(named, red_places, each) for each in strengths],
}
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for label, values in curves.items():
    mean, error = (
        np.array([each.mean() for each in values]),
        np.array([each.std() / len(each) ** 0.5 for each in values]),
    )
    axis.errorbar(strengths, mean, error, marker="o", capsize=3, label=label)
axis.set_xlabel("strength, in its usual largest value")
axis.set_ylabel("part of the way to red\n(mean, standard error over scenes)")
axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## In closed loop
#
# Now the policy acts, with either feature taken out of the top camera's tokens at every step.

# %%
arms = [BASELINE]
for feature in (used, named):
    arms.append(EditArm(f"without {feature}", [SAEFeatureEdit(site, sae.splice(), [feature], scale=0.0, tokens=TOP)]))
done = run_rollouts(model, "goal", episodes=6, seed=910_000, arms=arms)
for name, arm in done.summary.items():
    rate, (low, high) = arm.overall, arm.overall.interval
    print(f"{name:12} {rate.successes} of {rate.episodes} succeed, 95 % interval {low:.0%} to {high:.0%}")

# %% [markdown]
# ## What this shows, and what it does not
#
# - A feature from which the instruction can be read without an error need not be one that the policy uses. Reading and
#   using are two questions, and only an edit answers the second.
# - Moving one feature to another place moves the plan a good part of the way to the other block, and more than at a
#   random place. It is not all of the way: other features and other tokens carry the rest.
# - Taking either out in closed loop cost at most one episode of six here: what moves one chunk of actions need not
#   decide an episode, in which the policy plans again every four steps. How little six episodes say, the intervals
#   say.
# - It is one autoencoder of one layer; another seed may split the marker into several features. `hooked-vla sae steer`
#   runs doses and ablations with random directions as controls ([autoencoders](../saes.md)).
