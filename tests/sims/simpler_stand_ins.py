"""Stand-ins for what ManiSkill downloads for SimplerEnv: boxes for objects, a robot of boxes, plain photographs.

Shapes and looks are made up; the names, the joints and the files are those that its environments ask for.
"""

import json
from pathlib import Path

import numpy as np

# joint, its axis, how far it is from the one before (x, y, z), and its limits
_ARM = [
    ("waist", "0 0 1", "0 0 0.07", 3.14),
    ("shoulder", "0 1 0", "0 0 0.04", 1.9),
    ("elbow", "0 1 0", "0.05 0 0.25", 1.8),
    ("forearm_roll", "1 0 0", "0.17 0 0", 3.14),
    ("wrist_angle", "0 1 0", "0.08 0 0", 2.1),
    ("wrist_rotate", "1 0 0", "0.06 0 0", 3.14),
]
# model -> half size of its box
OBJECTS = {
    "bridge_carrot_generated_modified": (0.05, 0.012, 0.012),
    "bridge_plate_objaverse_larger": (0.07, 0.07, 0.01),
    "bridge_spoon_generated_modified": (0.06, 0.01, 0.008),
    "table_cloth_generated_shorter": (0.07, 0.05, 0.003),
    "eggplant": (0.04, 0.02, 0.02),
    "dummy_sink_target_plane": (0.06, 0.06, 0.005),
    "sink": (0.2, 0.2, 0.01),
    "baked_green_cube_3cm": (0.015, 0.015, 0.015),
    "baked_yellow_cube_3cm": (0.015, 0.015, 0.015),
}


def make(data: Path) -> None:
    """Fill ManiSkill's data folder."""
    import cv2
    import trimesh

    bridge = data / "tasks" / "bridge_v2_real2sim_dataset"
    for name, half in OBJECTS.items():
        folder = bridge / "custom" / "models" / name
        folder.mkdir(parents=True)
        box = trimesh.creation.box(2 * np.array(half))
        box.export(folder / "collision.obj")
        box.export(folder / "textured.glb")
    about = {
        name: {"bbox": {"min": [-x for x in half], "max": list(half)}, "scales": [1.0], "density": 800}
        for name, half in OBJECTS.items()
    }
    for file in ("info_bridge_custom_v0.json", "info_bridge_custom_baked_tex_v0.json"):
        (bridge / "custom" / file).write_text(json.dumps(about))
    (bridge / "stages").mkdir()
    for file in ("bridge_table_1_v1.glb", "bridge_table_1_v2.glb"):
        # scenes lie on their side and off the middle: mani_skill BaseBridgeEnv._load_scene
        table = trimesh.creation.box([4, 0.02, 4])
        table.apply_translation([-2.0634, 0.85, 2.8313])
        table.export(bridge / "stages" / file)
    (bridge / "real_inpainting").mkdir()
    for file, colour in (("bridge_real_eval_1.png", (200, 60, 60)), ("bridge_sink.png", (60, 200, 60))):
        cv2.imwrite(str(bridge / "real_inpainting" / file), np.full((480, 640, 3), colour, np.uint8))
    robot = data / "robots" / "widowx"
    robot.mkdir(parents=True)
    (robot / "wx250s.urdf").write_text(_urdf())


def _link(name: str, size: str) -> str:
    shape = f'<origin xyz="0 0 0"/><geometry><box size="{size}"/></geometry>'
    inertia = (
        '<inertial><mass value="0.2"/><inertia ixx="1e-3" ixy="0" ixz="0" iyy="1e-3" iyz="0" izz="1e-3"/></inertial>'
    )
    return f'<link name="{name}">{inertia}<visual>{shape}</visual><collision>{shape}</collision></link>'


def _joint(name: str, kind: str, parent: str, child: str, rest: str) -> str:
    return f'<joint name="{name}" type="{kind}"><parent link="{parent}"/><child link="{child}"/>{rest}</joint>'


def _urdf() -> str:
    parts, parent = [_link("base_link", "0.05 0.05 0.02")], "base_link"
    for name, axis, offset, limit in _ARM:
        parts.append(_link(f"{name}_link", "0.03 0.03 0.03"))
        bounds = f'<limit lower="-{limit}" upper="{limit}" effort="200" velocity="3"/>'
        rest = f'<origin xyz="{offset}"/><axis xyz="{axis}"/>{bounds}'
        parts.append(_joint(name, "revolute", parent, f"{name}_link", rest))
        parent = f"{name}_link"
    parts.append(_link("ee_gripper_link", "0.01 0.01 0.01"))
    parts.append(_joint("ee_gripper", "fixed", parent, "ee_gripper_link", '<origin xyz="0.09 0 0"/>'))
    for side, sign in (("left", 1), ("right", -1)):
        parts.append(_link(f"{side}_finger_link", "0.05 0.01 0.02"))
        rest = (
            f'<origin xyz="0.07 0 0"/><axis xyz="0 {sign} 0"/>'
            '<limit lower="0.0" upper="0.04" effort="60" velocity="1"/>'
        )
        parts.append(_joint(f"{side}_finger", "prismatic", parent, f"{side}_finger_link", rest))
    return f'<robot name="wx250s">{"".join(parts)}</robot>'
