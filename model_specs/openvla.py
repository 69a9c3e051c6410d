"""OpenVLA: DINOv2 and SigLIP side by side, and Llama-2-7B, which says seven action tokens."""

from dataclasses import replace

from hooked_vla.spec import (
    CheckpointSpec,
    DecoderSpec,
    FeatureSpec,
    LanguageVLASpec,
    PromptSpec,
    ReadoutSpec,
    Split,
    TowerSpec,
)

SPEC = LanguageVLASpec(
    name="openvla",
    family="openvla",
    config_type="openvla",
    description="DINOv2-L and SigLIP-So400m side by side, and Llama-2-7B, which says one token per action dimension",
    paper="https://arxiv.org/abs/2406.09246",
    licence="MIT; the weights are under Llama 2's licence",
    source="openvla/openvla, prismatic/extern/hf",
    n_parameters=7_541_237_184,
    checkpoints=(
        CheckpointSpec("openvla/openvla-7b", "trained on Open X-Embodiment: one camera, unnorm_key chooses the robot"),
        CheckpointSpec("openvla/openvla-7b-finetuned-libero-spatial", "LIBERO fine-tune"),
        CheckpointSpec("openvla/openvla-7b-finetuned-libero-object", "LIBERO fine-tune"),
        CheckpointSpec("openvla/openvla-7b-finetuned-libero-goal", "LIBERO fine-tune"),
        CheckpointSpec("openvla/openvla-7b-finetuned-libero-10", "LIBERO fine-tune"),
        CheckpointSpec("openvla/openvla-v01-7b", "first version: SigLIP alone and Vicuna"),
    ),
    towers={
        "dino": TowerSpec(
            image_size=224, patch_size=14, d_model=1024, n_layers=24, n_heads=16, d_mlp=4096, act="gelu", eps=1e-6,
            n_prefix_tokens=5, layer_scale=True, attention_pool=False,
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        ),
        "siglip": TowerSpec(
            image_size=224, patch_size=14, d_model=1152, n_layers=27, n_heads=16, d_mlp=4304, act="gelu", eps=1e-6,
            n_prefix_tokens=0, layer_scale=False, attention_pool=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        ),
    },
    connector=(8704, 4096),
    film=False,
    vlm=DecoderSpec(
        d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_head=128, d_mlp=11008,
        act="silu", eps=1e-6, rope_base=10_000.0, d_vocab=32064,
    ),
    prompt=PromptSpec(
        template="In: What action should the robot take to {}?\nOut:", start=1, end=29871, stop=2,
    ),
    readout=ReadoutSpec(
        kind="generate", chunk=1, d_action=7, d_state=0, n_bins=256, n_padding_ids=64, bounds=("q01", "q99"),
    ),
    features=FeatureSpec(
        cameras=("primary",), d_state=0, d_action=7, resize=(224, 224), empty_cameras=0, n_action_steps=1,
        max_text=2048, pad_text="longest", tokenizer="openvla/openvla-7b",
    ),
    keys={
        "vision_backbone.featurizer.": {
            "cls_token": "vision.dino.cls_token",
            "reg_token": "vision.dino.reg_token",
            "pos_embed": "vision.dino.pos_embed",
            "patch_embed.proj.weight": "vision.dino.patch_embed.weight",
            "patch_embed.proj.bias": "vision.dino.patch_embed.bias",
            "blocks.{}.norm1.weight": "vision.dino.blocks.{}.ln1.weight",
            "blocks.{}.norm1.bias": "vision.dino.blocks.{}.ln1.bias",
            "blocks.{}.attn.qkv.weight": Split((
                "vision.dino.blocks.{}.attn.q_proj.weight",
                "vision.dino.blocks.{}.attn.k_proj.weight",
                "vision.dino.blocks.{}.attn.v_proj.weight",
            )),
            "blocks.{}.attn.qkv.bias": Split((
                "vision.dino.blocks.{}.attn.q_proj.bias",
                "vision.dino.blocks.{}.attn.k_proj.bias",
                "vision.dino.blocks.{}.attn.v_proj.bias",
            )),
            "blocks.{}.attn.proj.weight": "vision.dino.blocks.{}.attn.o_proj.weight",
            "blocks.{}.attn.proj.bias": "vision.dino.blocks.{}.attn.o_proj.bias",
            "blocks.{}.ls1.scale_factor": "vision.dino.blocks.{}.ls1.scale",
            "blocks.{}.norm2.weight": "vision.dino.blocks.{}.ln2.weight",
            "blocks.{}.norm2.bias": "vision.dino.blocks.{}.ln2.bias",
            "blocks.{}.mlp.fc1.weight": "vision.dino.blocks.{}.mlp.up_proj.weight",
            "blocks.{}.mlp.fc1.bias": "vision.dino.blocks.{}.mlp.up_proj.bias",
            "blocks.{}.mlp.fc2.weight": "vision.dino.blocks.{}.mlp.down_proj.weight",
            "blocks.{}.mlp.fc2.bias": "vision.dino.blocks.{}.mlp.down_proj.bias",
            "blocks.{}.ls2.scale_factor": "vision.dino.blocks.{}.ls2.scale",
            "norm.weight": "vision.dino.ln_final.weight",
            "norm.bias": "vision.dino.ln_final.bias",
        },
        "vision_backbone.fused_featurizer.": {
            "pos_embed": "vision.siglip.pos_embed",
            "patch_embed.proj.weight": "vision.siglip.patch_embed.weight",
            "patch_embed.proj.bias": "vision.siglip.patch_embed.bias",
            "blocks.{}.norm1.weight": "vision.siglip.blocks.{}.ln1.weight",
            "blocks.{}.norm1.bias": "vision.siglip.blocks.{}.ln1.bias",
            "blocks.{}.attn.qkv.weight": Split((
                "vision.siglip.blocks.{}.attn.q_proj.weight",
                "vision.siglip.blocks.{}.attn.k_proj.weight",
                "vision.siglip.blocks.{}.attn.v_proj.weight",
            )),
            "blocks.{}.attn.qkv.bias": Split((
                "vision.siglip.blocks.{}.attn.q_proj.bias",
                "vision.siglip.blocks.{}.attn.k_proj.bias",
                "vision.siglip.blocks.{}.attn.v_proj.bias",
            )),
            "blocks.{}.attn.proj.weight": "vision.siglip.blocks.{}.attn.o_proj.weight",
            "blocks.{}.attn.proj.bias": "vision.siglip.blocks.{}.attn.o_proj.bias",
            "blocks.{}.norm2.weight": "vision.siglip.blocks.{}.ln2.weight",
            "blocks.{}.norm2.bias": "vision.siglip.blocks.{}.ln2.bias",
            "blocks.{}.mlp.fc1.weight": "vision.siglip.blocks.{}.mlp.up_proj.weight",
            "blocks.{}.mlp.fc1.bias": "vision.siglip.blocks.{}.mlp.up_proj.bias",
            "blocks.{}.mlp.fc2.weight": "vision.siglip.blocks.{}.mlp.down_proj.weight",
            "blocks.{}.mlp.fc2.bias": "vision.siglip.blocks.{}.mlp.down_proj.bias",
            "norm.weight": "vision.siglip.ln_final.weight",
            "norm.bias": "vision.siglip.ln_final.bias",
            "attn_pool.latent": "vision.siglip.attn_pool.latent",
            "attn_pool.q.weight": "vision.siglip.attn_pool.q.weight",
            "attn_pool.q.bias": "vision.siglip.attn_pool.q.bias",
            "attn_pool.kv.weight": "vision.siglip.attn_pool.kv.weight",
            "attn_pool.kv.bias": "vision.siglip.attn_pool.kv.bias",
            "attn_pool.proj.weight": "vision.siglip.attn_pool.proj.weight",
            "attn_pool.proj.bias": "vision.siglip.attn_pool.proj.bias",
            "attn_pool.norm.weight": "vision.siglip.attn_pool.norm.weight",
            "attn_pool.norm.bias": "vision.siglip.attn_pool.norm.bias",
            "attn_pool.mlp.fc1.weight": "vision.siglip.attn_pool.fc1.weight",
            "attn_pool.mlp.fc1.bias": "vision.siglip.attn_pool.fc1.bias",
            "attn_pool.mlp.fc2.weight": "vision.siglip.attn_pool.fc2.weight",
            "attn_pool.mlp.fc2.bias": "vision.siglip.attn_pool.fc2.bias",
        },
        "projector.": {
            "fc1.weight": "connector.layers.0.proj.weight",
            "fc1.bias": "connector.layers.0.proj.bias",
            "fc2.weight": "connector.layers.1.proj.weight",
            "fc2.bias": "connector.layers.1.proj.bias",
            "fc3.weight": "connector.proj.weight",
            "fc3.bias": "connector.proj.bias",
        },
        # a diffusion head makes the language model the expert
        "language_model.": {
            "model.embed_tokens.weight": ("vlm.embed.weight", "expert.embed.weight"),
            "model.layers.{}.input_layernorm.weight": ("vlm.blocks.{}.ln1.weight", "expert.blocks.{}.ln1.weight"),
            "model.layers.{}.self_attn.q_proj.weight": (
                "vlm.blocks.{}.attn.q_proj.weight", "expert.blocks.{}.attn.q_proj.weight",
            ),
            "model.layers.{}.self_attn.k_proj.weight": (
                "vlm.blocks.{}.attn.k_proj.weight", "expert.blocks.{}.attn.k_proj.weight",
            ),
            "model.layers.{}.self_attn.v_proj.weight": (
                "vlm.blocks.{}.attn.v_proj.weight", "expert.blocks.{}.attn.v_proj.weight",
            ),
            "model.layers.{}.self_attn.o_proj.weight": (
                "vlm.blocks.{}.attn.o_proj.weight", "expert.blocks.{}.attn.o_proj.weight",
            ),
            "model.layers.{}.post_attention_layernorm.weight": (
                "vlm.blocks.{}.ln2.weight", "expert.blocks.{}.ln2.weight",
            ),
            "model.layers.{}.mlp.gate_proj.weight": (
                "vlm.blocks.{}.mlp.gate_proj.weight", "expert.blocks.{}.mlp.gate_proj.weight",
            ),
            "model.layers.{}.mlp.up_proj.weight": (
                "vlm.blocks.{}.mlp.up_proj.weight", "expert.blocks.{}.mlp.up_proj.weight",
            ),
            "model.layers.{}.mlp.down_proj.weight": (
                "vlm.blocks.{}.mlp.down_proj.weight", "expert.blocks.{}.mlp.down_proj.weight",
            ),
            "model.norm.weight": ("vlm.ln_final.weight", "expert.ln_final.weight"),
            "lm_head.weight": ("vlm.unembed.weight", "expert.unembed.weight"),
        },
        # files of their own beside the weights, `<name>--<step>_checkpoint.pt`
        "proprio_projector/module.|proprio_projector/": {
            "fc1.weight": ("vlm.state_proj.in_proj.weight", "expert.state_proj.in_proj.weight"),
            "fc1.bias": ("vlm.state_proj.in_proj.bias", "expert.state_proj.in_proj.bias"),
            "fc2.weight": ("vlm.state_proj.out_proj.weight", "expert.state_proj.out_proj.weight"),
            "fc2.bias": ("vlm.state_proj.out_proj.bias", "expert.state_proj.out_proj.bias"),
        },
        "action_head/module.model.|action_head/model.": {
            "layer_norm1.weight": "head.ln_in.weight",
            "layer_norm1.bias": "head.ln_in.bias",
            "fc1.weight": "head.proj_in.weight",
            "fc1.bias": "head.proj_in.bias",
            "mlp_resnet_blocks.{}.ffn.0.weight": "head.blocks.{}.ln2.weight",
            "mlp_resnet_blocks.{}.ffn.0.bias": "head.blocks.{}.ln2.bias",
            "mlp_resnet_blocks.{}.ffn.1.weight": "head.blocks.{}.proj.weight",
            "mlp_resnet_blocks.{}.ffn.1.bias": "head.blocks.{}.proj.bias",
            "layer_norm2.weight": "head.ln_final.weight",
            "layer_norm2.bias": "head.ln_final.bias",
            "fc2.weight": "head.proj_out.weight",
            "fc2.bias": "head.proj_out.bias",
        },
        "action_head/module.noise_predictor.mlp_resnet.|action_head/noise_predictor.mlp_resnet.": {
            "layer_norm1.weight": "expert.head.ln_in.weight",
            "layer_norm1.bias": "expert.head.ln_in.bias",
            "fc1.weight": "expert.head.proj_in.weight",
            "fc1.bias": "expert.head.proj_in.bias",
            "mlp_resnet_blocks.{}.ffn.0.weight": "expert.head.blocks.{}.ln2.weight",
            "mlp_resnet_blocks.{}.ffn.0.bias": "expert.head.blocks.{}.ln2.bias",
            "mlp_resnet_blocks.{}.ffn.1.weight": "expert.head.blocks.{}.proj.weight",
            "mlp_resnet_blocks.{}.ffn.1.bias": "expert.head.blocks.{}.proj.bias",
            "layer_norm2.weight": "expert.head.ln_final.weight",
            "layer_norm2.bias": "expert.head.ln_final.bias",
            "fc2.weight": "expert.head.proj_out.weight",
            "fc2.bias": "expert.head.proj_out.bias",
        },
        "noisy_action_projector/module.|noisy_action_projector/": {
            "fc1.weight": "expert.action_in_proj.in_proj.weight",
            "fc1.bias": "expert.action_in_proj.in_proj.bias",
            "fc2.weight": "expert.action_in_proj.out_proj.weight",
            "fc2.bias": "expert.action_in_proj.out_proj.bias",
        },
    },
    tied={
        "decode.blocks.{}.ln1.weight": "vlm.blocks.{}.ln1.weight",
        "decode.blocks.{}.attn.q_proj.weight": "vlm.blocks.{}.attn.q_proj.weight",
        "decode.blocks.{}.attn.k_proj.weight": "vlm.blocks.{}.attn.k_proj.weight",
        "decode.blocks.{}.attn.v_proj.weight": "vlm.blocks.{}.attn.v_proj.weight",
        "decode.blocks.{}.attn.o_proj.weight": "vlm.blocks.{}.attn.o_proj.weight",
        "decode.blocks.{}.ln2.weight": "vlm.blocks.{}.ln2.weight",
        "decode.blocks.{}.mlp.gate_proj.weight": "vlm.blocks.{}.mlp.gate_proj.weight",
        "decode.blocks.{}.mlp.up_proj.weight": "vlm.blocks.{}.mlp.up_proj.weight",
        "decode.blocks.{}.mlp.down_proj.weight": "vlm.blocks.{}.mlp.down_proj.weight",
        "decode.ln_final.weight": "vlm.ln_final.weight",
    },
)  # fmt: skip

# the same wiring at a size that runs in milliseconds, with random weights and bytes for tokens
TINY = replace(
    SPEC,
    towers={
        "dino": replace(
            SPEC.towers["dino"], image_size=32, patch_size=8, d_model=32, n_layers=3, n_heads=2, d_mlp=64,
            n_prefix_tokens=3,
        ),
        "siglip": replace(
            SPEC.towers["siglip"], image_size=32, patch_size=8, d_model=24, n_layers=3, n_heads=2, d_mlp=48,
        ),
    },
    connector=(96, 48),
    vlm=replace(SPEC.vlm, d_model=48, n_layers=3, n_heads=4, n_kv_heads=4, d_head=12, d_mlp=96, d_vocab=576),
    prompt=replace(SPEC.prompt, end=300),
    readout=replace(SPEC.readout, d_action=4),
    features=replace(
        SPEC.features, cameras=("agent",), d_action=4, resize=(32, 32), max_text=128, tokenizer="bytes",
    ),
)  # fmt: skip

# a size that learns the tabletop on a CPU: 96-pixel cameras in 16 tokens each, one token a word. The published model
# sees one camera; here it needs the wrist's too, which alone shows how high the cup is and what it holds: it reads no
# state
TABLETOP = replace(
    SPEC,
    towers={
        "dino": replace(
            SPEC.towers["dino"], image_size=96, patch_size=24, d_model=96, n_layers=4, n_heads=4, d_mlp=256,
            n_prefix_tokens=3,
        ),
        "siglip": replace(
            SPEC.towers["siglip"], image_size=96, patch_size=24, d_model=96, n_layers=4, n_heads=4, d_mlp=256,
            attention_pool=False,
        ),
    },
    connector=(256, 128),
    vlm=replace(SPEC.vlm, d_model=128, n_layers=4, n_heads=4, n_kv_heads=4, d_head=32, d_mlp=256, d_vocab=512),
    # the last words before the action tokens, as packaging lays them out
    prompt=replace(SPEC.prompt, start=189, end=191, stop=190),
    readout=replace(SPEC.readout, d_action=4),
    features=replace(
        SPEC.features, cameras=("top", "wrist"), d_action=4, resize=(96, 96), max_text=32, pad_text="max_length",
        tokenizer="tabletop",
    ),
)  # fmt: skip
