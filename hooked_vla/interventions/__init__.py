"""Interventions as data: edits that say what to change where, and models that run under them.

>>> from hooked_vla.interventions import AddRelative, Patch
>>> steer = AddRelative("vlm.blocks.8.hook_resid_post", direction, strength=0.5, tokens="language", name="steer")
>>> with model.edits([steer]) as edits:
...     model(obs)
...     edits.set("steer", strength=1.0)
...     model(obs)
"""

from hooked_vla.interventions.arm import EditArm
from hooked_vla.interventions.compiled import Compiled
from hooked_vla.interventions.edit_set import Edits, EditSet
from hooked_vla.interventions.edits import (
    Ablate,
    Add,
    AddRelative,
    Clamp,
    Edit,
    Overwrite,
    Patch,
    ProjectOut,
    Scale,
    SubspacePatch,
    per_row,
)
from hooked_vla.interventions.files import describe_edits, load_edits, read_edits, save_edits
from hooked_vla.interventions.reach import CutSetWarning, DeadEndWarning, cut_set, is_replay
from hooked_vla.interventions.sae_edits import SAEFeatureEdit, SAEReconstruct
from hooked_vla.interventions.values import Values
from hooked_vla.interventions.where import Window

__all__ = [
    "Ablate",
    "Add",
    "AddRelative",
    "Clamp",
    "Compiled",
    "CutSetWarning",
    "DeadEndWarning",
    "Edit",
    "EditArm",
    "EditSet",
    "Edits",
    "Overwrite",
    "Patch",
    "ProjectOut",
    "SAEFeatureEdit",
    "SAEReconstruct",
    "Scale",
    "SubspacePatch",
    "Values",
    "Window",
    "cut_set",
    "describe_edits",
    "is_replay",
    "load_edits",
    "per_row",
    "read_edits",
    "save_edits",
]  # fmt: skip
