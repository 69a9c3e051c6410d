"""The scene as MuJoCo XML: a table, four coloured blocks, three coloured pads, a gantry gripper, two cameras.

The gripper slides along three axes instead of hanging on an arm, so an action needs no inverse kinematics; its two
fingers hold a block by friction. Lengths in metres, z = 0 on the table. Rendering in software is cheap only without
multisampling and shadows, so both are off.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """A block that can be picked up. shape: "box" or "cylinder"."""

    shape: str
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Pad:
    """A square drawn on the table, centred at `xy`; nothing collides with it."""

    xy: tuple[float, float]
    rgb: tuple[float, float, float]


BLOCKS = {
    "red": Block("box", (0.85, 0.12, 0.10)),
    "green": Block("cylinder", (0.10, 0.65, 0.20)),
    "blue": Block("box", (0.12, 0.25, 0.85)),
    "yellow": Block("box", (0.95, 0.80, 0.10)),
}
PADS = {
    "orange": Pad((-0.18, 0.22), (0.90, 0.50, 0.10)),
    "purple": Pad((0.00, 0.22), (0.60, 0.20, 0.70)),
    "cyan": Pad((0.18, 0.22), (0.20, 0.80, 0.80)),
}
CAMERAS = ("agent", "wrist")
SLIDES = ("x", "y", "z")
FINGERS = ("finger_left", "finger_right")

BLOCK_HALF = 0.022
PAD_HALF = 0.040
FINGER_TRAVEL = 0.035
# the point between the finger tips, when the slides stand at 0
GRIP_HOME = (0.0, 0.0, 0.17)
# slides' ranges, as low and high; the lowest leaves the finger tips 3 mm above the table
SLIDE_LOW = (-0.30, -0.30, -0.147)
SLIDE_HIGH = (0.30, 0.30, 0.100)
TIMESTEP = 0.005


def scene_xml(image_size: int) -> str:
    """The scene's MJCF; image_size bounds what may be rendered off screen, in pixels."""
    pads = "\n    ".join(_pad(name, pad) for name, pad in PADS.items())
    blocks = "\n    ".join(_block(name, block) for name, block in BLOCKS.items())
    return f"""
<mujoco model="tabletop">
  <option timestep="{TIMESTEP}" iterations="10" ls_iterations="6" integrator="implicitfast"/>
  <visual>
    <quality shadowsize="0" offsamples="0"/>
    <global offwidth="{image_size}" offheight="{image_size}"/>
    <headlight ambient=".55 .55 .55" diffuse=".5 .5 .5" specular="0 0 0"/>
  </visual>
  <asset>
    <texture type="skybox" builtin="flat" rgb1=".8 .85 .9" rgb2=".8 .85 .9" width="8" height="8"/>
  </asset>
  <default>
    <position kp="400" kv="40"/>
    <default class="slide"> <joint type="slide" damping="5"/> </default>
    <default class="hand"> <geom contype="0" conaffinity="0" rgba=".35 .35 .38 1"/> </default>
    <default class="finger">
      <joint type="slide" axis="1 0 0" damping="2"/>
      <geom type="box" size=".005 .012 .03" mass=".03" friction="1.5 .02 .001" condim="4" rgba=".1 .1 .1 1"/>
      <position kp="120" kv="8"/>
    </default>
    <default class="block"> <geom mass=".05" friction="1 .01 .001" condim="4"/> </default>
  </default>
  <worldbody>
    <camera name="agent" pos="0 -.70 .85" xyaxes="1 0 0 0 .788 .616" fovy="45"/>
    <geom name="table" type="box" size=".35 .35 .02" pos="0 0 -.02" rgba=".75 .68 .58 1"/>
    {pads}
    {blocks}
    <body name="gantry_x" pos="0 0 .2" gravcomp="1" childclass="slide">
      <joint name="x" axis="1 0 0" range="{SLIDE_LOW[0]} {SLIDE_HIGH[0]}"/>
      <inertial pos="0 0 0" mass=".3" diaginertia="1e-4 1e-4 1e-4"/>
      <body name="gantry_y" gravcomp="1">
        <joint name="y" axis="0 1 0" range="{SLIDE_LOW[1]} {SLIDE_HIGH[1]}"/>
        <inertial pos="0 0 0" mass=".3" diaginertia="1e-4 1e-4 1e-4"/>
        <body name="hand" gravcomp="1">
          <joint name="z" axis="0 0 1" range="{SLIDE_LOW[2]} {SLIDE_HIGH[2]}"/>
          <geom class="hand" type="cylinder" size=".018 .06" pos="0 0 .08" mass=".2"/>
          <geom class="hand" type="box" size=".05 .015 .01" pos="0 0 .015" mass=".1"/>
          <site name="grip" pos="0 0 {GRIP_HOME[2] - 0.2:.3f}" size=".002" rgba="0 0 0 0"/>
          <camera name="wrist" pos="0 -.06 .05" xyaxes="1 0 0 0 .95 .3" fovy="75"/>
          <body name="finger_left" gravcomp="1" childclass="finger">
            <joint name="finger_left" range="-.04 0"/>
            <geom name="finger_left" pos="-.005 0 -.02"/>
          </body>
          <body name="finger_right" gravcomp="1" childclass="finger">
            <joint name="finger_right" range="0 .04"/>
            <geom name="finger_right" pos=".005 0 -.02"/>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <position name="x" joint="x"/>
    <position name="y" joint="y"/>
    <position name="z" joint="z"/>
    <position class="finger" name="finger_left" joint="finger_left"/>
    <position class="finger" name="finger_right" joint="finger_right"/>
  </actuator>
</mujoco>
"""


def _block(name: str, block: Block) -> str:
    size = " ".join([f"{BLOCK_HALF}"] * 3)
    return (
        f'<body name="{name}" childclass="block"> <freejoint/> '
        f'<geom type="{block.shape}" size="{size}" rgba="{_rgba(block.rgb)}"/> </body>'
    )


def _pad(name: str, pad: Pad) -> str:
    x, y = pad.xy
    return (
        f'<site name="pad_{name}" type="box" size="{PAD_HALF} {PAD_HALF} .001" pos="{x} {y} .001" '
        f'rgba="{_rgba(pad.rgb)}"/>'
    )


def _rgba(rgb: tuple[float, float, float]) -> str:
    return " ".join(f"{value}" for value in (*rgb, 1))
