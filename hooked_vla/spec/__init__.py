"""Frozen descriptions of models: sizes, choices between components, key rules. Standard library only.

A file in model_specs holds one literal spec at the published size. Loading a checkpoint replaces the sizes in it by
those that the checkpoint states; nothing else is decided anywhere but here.
"""

from hooked_vla.spec.base import (
    CheckpointSpec,
    ConnectorSpec,
    DecoderSpec,
    ExpertSpec,
    FeatureSpec,
    FlowSpec,
    FlowVLASpec,
    KeyTarget,
    ModelSpec,
    PrefixSpec,
    Split,
    Transposed,
    VisionSpec,
)
from hooked_vla.spec.embodied import AdapterSpec, ChatSpec, DiTSpec, EmbodimentFlowSpec, FeatureVLASpec, PatchVisionSpec
from hooked_vla.spec.joint import FastSpec, FastVLASpec, JointFlowVLASpec, PrefixVLASpec
from hooked_vla.spec.language import LanguageVLASpec, PromptSpec, ReadoutSpec, TowerSpec
from hooked_vla.spec.prompted import ConvTowerSpec, EncoderSpec, PromptedExpertSpec, PromptedVLASpec, ResampleSpec
from hooked_vla.spec.visuomotor import (
    CausalSpec,
    ChunkTransformerSpec,
    CodePolicySpec,
    CodeSpec,
    DiffusionPolicySpec,
    EncoderDecoderSpec,
    KeypointSpec,
    LatentSpec,
    ResNetSpec,
    SamplerSpec,
    UNetSpec,
)

__all__ = [
    "AdapterSpec",
    "CausalSpec",
    "ChatSpec",
    "CheckpointSpec",
    "ChunkTransformerSpec",
    "CodePolicySpec",
    "CodeSpec",
    "ConnectorSpec",
    "ConvTowerSpec",
    "DecoderSpec",
    "DiTSpec",
    "DiffusionPolicySpec",
    "EmbodimentFlowSpec",
    "EncoderDecoderSpec",
    "EncoderSpec",
    "ExpertSpec",
    "FastSpec",
    "FastVLASpec",
    "FeatureSpec",
    "FeatureVLASpec",
    "FlowSpec",
    "FlowVLASpec",
    "JointFlowVLASpec",
    "KeyTarget",
    "KeypointSpec",
    "LanguageVLASpec",
    "LatentSpec",
    "ModelSpec",
    "PatchVisionSpec",
    "PrefixSpec",
    "PrefixVLASpec",
    "PromptSpec",
    "PromptedExpertSpec",
    "PromptedVLASpec",
    "ReadoutSpec",
    "ResNetSpec",
    "ResampleSpec",
    "SamplerSpec",
    "Split",
    "TowerSpec",
    "Transposed",
    "UNetSpec",
    "VisionSpec",
]
