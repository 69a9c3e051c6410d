# %% [markdown]
# # Add your own checkpoint
#
# **Question.** A policy was fine-tuned with its public code. Is it read right here, and how would one notice if not?
#
# `HookedVLA.from_pretrained` takes a folder or a hub id. The family is recognised from the checkpoint's own files,
# sizes from the shapes of its tensors, cameras and normalisation from its configuration. Nothing is registered by
# hand, and a fine-tune of a known family needs no code.
#
# As a stand-in for yours, this page takes a trained policy of the package, which lies there in SmolVLA's public
# layout.

# %%
import json
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file, save_file

from hooked_vla import HookedVLA
from hooked_vla.rollouts.suites import observation
from hooked_vla.rollouts.sweep import run_rollouts
from hooked_vla.rollouts.tabletop import TabletopEnv
from hooked_vla.weights import SHIPPED

torch.set_grad_enabled(False)
temporary = tempfile.TemporaryDirectory()
yours = Path(temporary.name) / "yours"
shutil.copytree(SHIPPED / "smolvla-tabletop", yours)
print(sorted(file.name for file in yours.iterdir() if file.suffix in (".json", ".safetensors")))

# %% [markdown]
# ## Load it, and read what loading says
#
# Every key of the checkpoint is used or named as dropped, every parameter is filled once, or loading raises. On the
# command line `hooked-vla info FOLDER` prints the same.

# %%
model = HookedVLA.from_pretrained(yours)
report, features = model.load_report, model.spec.features
print("family:", model.spec.name)
print("keys of the checkpoint that fill parameters:", len(report.loaded))
print("dropped:", list(report.dropped), "- statistics:", list(report.statistics))
print("cameras:", features.cameras, "- state:", features.d_state, "- action:", features.d_action)
print("normalisation:", dict(features.normalization))

# %% [markdown]
# What to look at: that the cameras are the ones that you trained with and in that order, that state and action have
# your robot's widths, and that normalisation is not `IDENTITY` where you had statistics. Each of these can be wrong in
# files that load.
#
# ## What a damaged one does
#
# A check that cannot fail shows nothing. Three ways to spoil a checkpoint, and what comes of them:


# %%
def spoiled(change):
    folder = Path(temporary.name) / "spoiled"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(yours, folder)
    change(folder)
    try:
        HookedVLA.from_pretrained(folder)
    except (ValueError, FileNotFoundError) as error:
        return f"{type(error).__name__}: {str(error).replace(str(folder), folder.name)[:150]}"
    return "loaded"


def lose_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.state_proj.weight")
    save_file(tensors, folder / "model.safetensors")


def add_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.my_adapter.weight": torch.zeros(2, 2)}, folder / "model.safetensors")


def call_it_something_else(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"type": "my_policy"}))


for change in (lose_a_tensor, add_a_tensor, call_it_something_else):
    print(f"{change.__name__}:\n    {spoiled(change)}")

# %% [markdown]
# ## Does it compute what it should?
#
# Writing it out again and reading that must give the same actions to the bit; and an observation that does not fit
# must be refused by name instead of being guessed at.

# %%
env = TabletopEnv("goal", "red-orange", cameras=("top", "wrist"))
obs = observation(env.reset(seed=3)[0])
noise = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0))
model.save_pretrained(Path(temporary.name) / "again")
again = HookedVLA.from_pretrained(Path(temporary.name) / "again")
print("the same bits after a round trip:", torch.equal(model(obs, noise).chunk, again(obs, noise).chunk))
try:
    model(type(obs)({"front": obs.images["top"]}, obs.state, obs.instruction))
except KeyError as error:
    print("KeyError:", error.args[0])

# %% [markdown]
# A round trip does not show that the actions are those of the code that trained it. With that code installed, run both
# on one observation with one noise and compare: for the families here, the recorded tests of the repository do that
# for a tiny checkpoint each, and agree to 1e-5. For your own weights the plainest test is to let the policy act:

# %%
done = run_rollouts(model, "goal", episodes=4, seed=900_100)
rate = done.summary["baseline"].overall
print(f"{rate.successes} of {rate.episodes} succeed, 95 % interval {rate.interval[0]:.0%} to {rate.interval[1]:.0%}")

figure, axes = plt.subplots(1, 2, figsize=(6, 2.6), layout="constrained")
axes[0].imshow(obs.images["top"])
axes[0].set_axis_off()
axes[1].plot(model(obs, noise).chunk[0])
axes[1].set_xlabel("step of the chunk")
axes[1].legend(["x", "y", "z", "gripper"], fontsize=8)
axes[1].set_title("planned actions, the robot's units", fontsize=9)
plt.show()

# %% [markdown]
# In your own simulator `hooked-vla rollouts --model FOLDER --suite libero_goal --episodes 50 --seed 0 --cameras
# image=agent,image2=wrist` does it ([simulators](../simulators.md)); the number to compare with is that of your
# training code's own evaluation.
#
# ## What this shows, and what it does not
#
# Loading accounts for every tensor, and refuses what it cannot explain. It cannot know a statistic that was computed
# over other data, or images that a camera driver had flipped: those load, and act badly. Four episodes say that
# nothing is broken, not how good a policy is; the interval above says how little they say.

# %%
temporary.cleanup()
