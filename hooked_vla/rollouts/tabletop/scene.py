"""The scene as MuJoCo XML: a table, coloured blocks and pads, a gantry with a suction cup, three cameras.

The cup slides along three axes instead of hanging on an arm, so an action needs no inverse kinematics; it holds a
block by MuJoCo's adhesion, so a grasp needs no alignment of fingers. Lengths in metres, z = 0 on the table. Rendering
in software is cheap only without multisampling and shadows, so both are off, and with flat faces in one piece instead
of MuJoCo's 16. A skybox would cost as much as all objects: the sky is filled in where nothing was drawn.
"""

from collections.abc import Iterable
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
    "green": Block("box", (0.10, 0.65, 0.20)),
    "blue": Block("box", (0.12, 0.25, 0.85)),
    "yellow": Block("box", (0.95, 0.85, 0.10)),
}
PADS = {
    "orange": Pad((-0.20, 0.20), (0.95, 0.50, 0.05)),
    "purple": Pad((0.00, 0.20), (0.60, 0.15, 0.75)),
    "cyan": Pad((0.20, 0.20), (0.15, 0.80, 0.85)),
}
CAMERAS = ("agent", "top", "wrist")
SLIDES = ("x", "y", "z")

BLOCK_HALF = 0.026
PAD_HALF = 0.055
CUP_HALF = 0.015
# the rim of the cup, when the slides stand at 0
CUP_HOME = (0.0, 0.0, 0.15)
# slides' ranges, as low and high; the lowest leaves the cup's rim 1 cm above the table
SLIDE_LOW = (-0.32, -0.32, -0.14)
SLIDE_HIGH = (0.32, 0.32, 0.10)
TIMESTEP = 0.005
# what cameras see beyond the table; 0..255
SKY = (204, 216, 229)


def scene_xml(blocks: Iterable[str], pads: Iterable[str], image_size: int) -> str:
    """The scene's MJCF with the named blocks and pads; image_size bounds what is rendered off screen, in pixels."""
    drawn_pads = "\n    ".join(_pad(name, PADS[name]) for name in pads)
    drawn_blocks = "\n    ".join(_block(name, BLOCKS[name]) for name in blocks)
    return f"""
<mujoco model="tabletop">
  <option timestep="{TIMESTEP}" iterations="10" ls_iterations="6" integrator="implicitfast"/>
  <visual>
    <quality shadowsize="0" offsamples="0" numquads="1" numstacks="2"/>
    <global offwidth="{image_size}" offheight="{image_size}"/>
    <headlight ambient=".55 .55 .55" diffuse=".5 .5 .5" specular="0 0 0"/>
  </visual>
  <default>
    <default class="slide">
      <joint type="slide" damping="5"/>
      <position kp="2500" kv="110"/>
    </default>
    <default class="hand"> <geom contype="0" conaffinity="0" rgba=".30 .30 .33 1"/> </default>
    <default class="block"> <geom mass=".05" friction="1 .01 .001" condim="3"/> </default>
  </default>
  <worldbody>
    <camera name="agent" pos="0 -.80 .80" xyaxes="1 0 0 0 .707 .707" fovy="42"/>
    <camera name="top" pos="0 0 1.05" xyaxes="1 0 0 0 1 0" fovy="39"/>
    <geom name="table" type="box" size=".38 .38 .02" pos="0 0 -.02" rgba=".75 .68 .58 1"/>
    {drawn_pads}
    {drawn_blocks}
    <body name="gantry_x" pos="{CUP_HOME[0]} {CUP_HOME[1]} {CUP_HOME[2]}" gravcomp="1" childclass="slide">
      <joint name="x" axis="1 0 0" range="{SLIDE_LOW[0]} {SLIDE_HIGH[0]}"/>
      <inertial pos="0 0 0" mass=".3" diaginertia="1e-4 1e-4 1e-4"/>
      <body name="gantry_y" gravcomp="1">
        <joint name="y" axis="0 1 0" range="{SLIDE_LOW[1]} {SLIDE_HIGH[1]}"/>
        <inertial pos="0 0 0" mass=".3" diaginertia="1e-4 1e-4 1e-4"/>
        <body name="hand" gravcomp="1">
          <joint name="z" axis="0 0 1" range="{SLIDE_LOW[2]} {SLIDE_HIGH[2]}"/>
          <geom class="hand" type="cylinder" size=".010 .05" pos="0 0 .07" mass=".3"/>
          <camera name="wrist" pos="0 -.075 .075" xyaxes="1 0 0 0 .86 .51" fovy="80"/>
          <body name="cup" gravcomp="1">
            <geom name="cup" type="box" size="{CUP_HALF} {CUP_HALF} .01" pos="0 0 .01" mass=".05" margin=".004"
              gap=".004" friction="1.5 .02 .001" condim="4" rgba=".15 .15 .15 1"/>
            <site name="rim" size=".002" rgba="0 0 0 0"/>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
  <actuator>
    <position class="slide" name="x" joint="x"/>
    <position class="slide" name="y" joint="y"/>
    <position class="slide" name="z" joint="z"/>
    <adhesion name="suction" body="cup" ctrlrange="0 1" gain="5"/>
  </actuator>
</mujoco>
"""


def _block(name: str, block: Block) -> str:
    size = " ".join([f"{BLOCK_HALF}"] * 3)
    return (
        f'<body name="{name}" childclass="block"> <freejoint/> '
        f'<geom name="{name}" type="{block.shape}" size="{size}" rgba="{_rgba(block.rgb)}"/> </body>'
    )


def _pad(name: str, pad: Pad) -> str:
    x, y = pad.xy
    return (
        f'<site name="pad_{name}" type="box" size="{PAD_HALF} {PAD_HALF} .001" pos="{x} {y} .001" '
        f'rgba="{_rgba(pad.rgb)}"/>'
    )


def _rgba(rgb: tuple[float, float, float]) -> str:
    return " ".join(f"{value}" for value in (*rgb, 1))
