"""OpenVLA-OFT: OpenVLA's backbone read in one bidirectional pass, a state token, and a chunk of regressed actions."""

from dataclasses import replace

from hooked_vla.spec import CheckpointSpec

from .openvla import SPEC as OPENVLA
from .openvla import TABLETOP as TABLETOP_OPENVLA
from .openvla import TINY as TINY_OPENVLA

SPEC = replace(
    OPENVLA,
    name="openvla_oft",
    description="OpenVLA's backbone over two cameras and the state, all tokens of a chunk read in one bidirectional "
    "pass by a residual network",
    paper="https://arxiv.org/abs/2502.19645",
    source="moojink/openvla-oft, with its fork of transformers",
    # the backbone, the regression head and the state projector
    n_parameters=7_709_173_191,
    checkpoints=(
        CheckpointSpec("moojink/openvla-7b-oft-finetuned-libero-spatial", "LIBERO: two cameras, state 8, chunk 8"),
        CheckpointSpec("moojink/openvla-7b-oft-finetuned-libero-object", "LIBERO"),
        CheckpointSpec("moojink/openvla-7b-oft-finetuned-libero-goal", "LIBERO"),
        CheckpointSpec("moojink/openvla-7b-oft-finetuned-libero-10", "LIBERO"),
        CheckpointSpec("moojink/openvla-7b-oft-finetuned-libero-spatial-object-goal-10", "all four LIBERO suites"),
    ),
    parts=("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone"),
    readout=replace(OPENVLA.readout, kind="regress", chunk=8, d_state=8, d_hidden=4096, n_layers=2),
    features=replace(OPENVLA.features, cameras=("primary", "wrist"), d_state=8, n_action_steps=8),
    tied={},
)

TINY = replace(
    SPEC,
    towers=TINY_OPENVLA.towers,
    connector=TINY_OPENVLA.connector,
    vlm=TINY_OPENVLA.vlm,
    prompt=TINY_OPENVLA.prompt,
    readout=replace(SPEC.readout, d_action=4, d_state=4, d_hidden=32),
    features=replace(TINY_OPENVLA.features, cameras=("agent", "wrist"), d_state=4, n_action_steps=8),
)

# the same backbone, as small as learns the tabletop
TABLETOP = replace(
    SPEC,
    towers=TABLETOP_OPENVLA.towers,
    connector=TABLETOP_OPENVLA.connector,
    vlm=TABLETOP_OPENVLA.vlm,
    prompt=TABLETOP_OPENVLA.prompt,
    readout=replace(SPEC.readout, d_action=4, d_state=4, d_hidden=64),
    features=replace(TABLETOP_OPENVLA.features, d_state=4, n_action_steps=4),
)
