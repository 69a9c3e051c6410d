"""SmolVLA: SmolVLM2's SigLIP tower and the first 16 of its 32 Llama layers, with a 16-layer action expert."""

from dataclasses import replace

from hooked_vla.spec import (
    CheckpointSpec,
    ConnectorSpec,
    DecoderSpec,
    ExpertSpec,
    FeatureSpec,
    FlowSpec,
    FlowVLASpec,
    PrefixSpec,
    VisionSpec,
)

SPEC = FlowVLASpec(
    name="smolvla",
    family="smolvla",
    config_type="smolvla",
    description="SigLIP-B/16, 16 layers of SmolLM2-360M, and an expert that alternates joint and cross-attention",
    paper="https://arxiv.org/abs/2506.01844",
    licence="Apache-2.0",
    source="LeRobot 0.6.1 policies/smolvla",
    n_parameters=450_046_176,
    checkpoints=(
        CheckpointSpec("lerobot/smolvla_base", "base: three cameras, state 6, action 6, text padded to 48"),
        CheckpointSpec("lerobot/smolvla_libero", "LIBERO fine-tune"),
        CheckpointSpec("HuggingFaceVLA/smolvla_libero", "LIBERO fine-tune"),
    ),
    vision=VisionSpec(
        image_size=512, patch_size=16, d_model=768, n_layers=12, n_heads=12, d_mlp=3072,
        act="gelu_pytorch_tanh", eps=1e-6,
    ),
    connector=ConnectorSpec(scale=4, bias=False),
    vlm=DecoderSpec(
        d_model=960, n_layers=16, n_heads=15, n_kv_heads=5, d_head=64, d_mlp=2560,
        act="silu", eps=1e-5, rope_base=10_000.0, d_vocab=49280,
    ),
    expert=ExpertSpec(
        decoder=DecoderSpec(
            d_model=720, n_layers=16, n_heads=15, n_kv_heads=5, d_head=64, d_mlp=2048,
            act="silu", eps=1e-5, rope_base=10_000.0,
        ),
        schedule=("joint", "cross") * 8,
    ),
    flow=FlowSpec(n_steps=10, chunk=50, d_action=32, d_state=32, min_period=4e-3, max_period=4.0),
    prefix=PrefixSpec(),
    features=FeatureSpec(
        cameras=("camera1", "camera2", "camera3"), d_state=6, d_action=6, resize=(512, 512), empty_cameras=0,
        n_action_steps=50, max_text=48, pad_text="max_length",
        tokenizer="HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        normalization={"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    ),
    fp32=("vlm.state_proj", "expert.action_in_proj", "expert.time_mlp_in", "expert.time_mlp_out",
          "expert.action_out_proj"),
    keys={
        "model.vlm_with_expert.vlm.model.vision_model.": {
            "embeddings.patch_embedding.weight": "vision.patch_embed.weight",
            "embeddings.patch_embedding.bias": "vision.patch_embed.bias",
            "embeddings.position_embedding.weight": "vision.pos_embed.weight",
            "encoder.layers.{}.layer_norm1.weight": "vision.blocks.{}.ln1.weight",
            "encoder.layers.{}.layer_norm1.bias": "vision.blocks.{}.ln1.bias",
            "encoder.layers.{}.self_attn.q_proj.weight": "vision.blocks.{}.attn.q_proj.weight",
            "encoder.layers.{}.self_attn.q_proj.bias": "vision.blocks.{}.attn.q_proj.bias",
            "encoder.layers.{}.self_attn.k_proj.weight": "vision.blocks.{}.attn.k_proj.weight",
            "encoder.layers.{}.self_attn.k_proj.bias": "vision.blocks.{}.attn.k_proj.bias",
            "encoder.layers.{}.self_attn.v_proj.weight": "vision.blocks.{}.attn.v_proj.weight",
            "encoder.layers.{}.self_attn.v_proj.bias": "vision.blocks.{}.attn.v_proj.bias",
            "encoder.layers.{}.self_attn.out_proj.weight": "vision.blocks.{}.attn.o_proj.weight",
            "encoder.layers.{}.self_attn.out_proj.bias": "vision.blocks.{}.attn.o_proj.bias",
            "encoder.layers.{}.layer_norm2.weight": "vision.blocks.{}.ln2.weight",
            "encoder.layers.{}.layer_norm2.bias": "vision.blocks.{}.ln2.bias",
            "encoder.layers.{}.mlp.fc1.weight": "vision.blocks.{}.mlp.up_proj.weight",
            "encoder.layers.{}.mlp.fc1.bias": "vision.blocks.{}.mlp.up_proj.bias",
            "encoder.layers.{}.mlp.fc2.weight": "vision.blocks.{}.mlp.down_proj.weight",
            "encoder.layers.{}.mlp.fc2.bias": "vision.blocks.{}.mlp.down_proj.bias",
            "post_layernorm.weight": "vision.ln_final.weight",
            "post_layernorm.bias": "vision.ln_final.bias",
        },
        "model.vlm_with_expert.vlm.": {
            "model.connector.modality_projection.proj.weight": "connector.proj.weight",
            "lm_head.weight": "vlm.unembed.weight",
        },
        "model.vlm_with_expert.vlm.model.text_model.": {
            "embed_tokens.weight": "vlm.embed.weight",
            "layers.{}.input_layernorm.weight": "vlm.blocks.{}.ln1.weight",
            "layers.{}.self_attn.q_proj.weight": "vlm.blocks.{}.attn.q_proj.weight",
            "layers.{}.self_attn.k_proj.weight": "vlm.blocks.{}.attn.k_proj.weight",
            "layers.{}.self_attn.v_proj.weight": "vlm.blocks.{}.attn.v_proj.weight",
            "layers.{}.self_attn.o_proj.weight": "vlm.blocks.{}.attn.o_proj.weight",
            "layers.{}.post_attention_layernorm.weight": "vlm.blocks.{}.ln2.weight",
            "layers.{}.mlp.gate_proj.weight": "vlm.blocks.{}.mlp.gate_proj.weight",
            "layers.{}.mlp.up_proj.weight": "vlm.blocks.{}.mlp.up_proj.weight",
            "layers.{}.mlp.down_proj.weight": "vlm.blocks.{}.mlp.down_proj.weight",
            "norm.weight": "vlm.ln_final.weight",
        },
        # an expert layer's attention is `attn` (joint) or `cross_attn`, whichever the schedule built
        "model.vlm_with_expert.lm_expert.": {
            "layers.{}.input_layernorm.weight": "expert.blocks.{}.ln1.weight",
            "layers.{}.self_attn.q_proj.weight": (
                "expert.blocks.{}.attn.q_proj.weight", "expert.blocks.{}.cross_attn.q_proj.weight",
            ),
            "layers.{}.self_attn.k_proj.weight": (
                "expert.blocks.{}.attn.k_proj.weight", "expert.blocks.{}.cross_attn.k_proj.weight",
            ),
            "layers.{}.self_attn.v_proj.weight": (
                "expert.blocks.{}.attn.v_proj.weight", "expert.blocks.{}.cross_attn.v_proj.weight",
            ),
            "layers.{}.self_attn.o_proj.weight": (
                "expert.blocks.{}.attn.o_proj.weight", "expert.blocks.{}.cross_attn.o_proj.weight",
            ),
            "layers.{}.post_attention_layernorm.weight": "expert.blocks.{}.ln2.weight",
            "layers.{}.mlp.gate_proj.weight": "expert.blocks.{}.mlp.gate_proj.weight",
            "layers.{}.mlp.up_proj.weight": "expert.blocks.{}.mlp.up_proj.weight",
            "layers.{}.mlp.down_proj.weight": "expert.blocks.{}.mlp.down_proj.weight",
            "norm.weight": "expert.ln_final.weight",
        },
        "model.": {
            "state_proj.weight": "vlm.state_proj.weight",
            "state_proj.bias": "vlm.state_proj.bias",
            "action_in_proj.weight": "expert.action_in_proj.weight",
            "action_in_proj.bias": "expert.action_in_proj.bias",
            "action_time_mlp_in.weight": "expert.time_mlp_in.weight",
            "action_time_mlp_in.bias": "expert.time_mlp_in.bias",
            "action_time_mlp_out.weight": "expert.time_mlp_out.weight",
            "action_time_mlp_out.bias": "expert.time_mlp_out.bias",
            "action_out_proj.weight": "expert.action_out_proj.weight",
            "action_out_proj.bias": "expert.action_out_proj.bias",
        },
    },
)  # fmt: skip

# the same wiring at a size that runs in milliseconds: for tests, tutorials and the demo, with random weights
TINY = replace(
    SPEC,
    vision=replace(SPEC.vision, image_size=64, patch_size=8, d_model=48, n_layers=2, n_heads=3, d_mlp=96),
    vlm=replace(SPEC.vlm, d_model=64, n_layers=4, n_heads=4, n_kv_heads=2, d_head=16, d_mlp=128, d_vocab=258),
    expert=ExpertSpec(
        decoder=replace(
            SPEC.expert.decoder, d_model=48, n_layers=4, n_heads=4, n_kv_heads=2, d_head=16, d_mlp=256
        ),
        schedule=("joint", "cross") * 2,
    ),
    flow=replace(SPEC.flow, n_steps=4, chunk=8, d_action=8, d_state=8),
    features=replace(
        SPEC.features, cameras=("agent", "wrist"), d_state=4, d_action=4, resize=(64, 64), n_action_steps=8,
        max_text=64, pad_text="longest", tokenizer="bytes", normalization={},
    ),
)  # fmt: skip

# a size that learns the tabletop on a CPU: 96-pixel cameras in 16 tokens each, one token a word
TABLETOP = replace(
    SPEC,
    vision=replace(SPEC.vision, image_size=96, patch_size=12, d_model=96, n_layers=3, n_heads=4, d_mlp=256),
    connector=replace(SPEC.connector, scale=2),
    vlm=replace(SPEC.vlm, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, d_head=32, d_mlp=256, d_vocab=128),
    expert=ExpertSpec(
        decoder=replace(SPEC.expert.decoder, d_model=96, n_layers=4, n_heads=4, n_kv_heads=2, d_head=32, d_mlp=256),
        schedule=("joint", "cross") * 2,
    ),
    flow=replace(SPEC.flow, chunk=8, d_action=4, d_state=4),
    features=replace(
        SPEC.features, cameras=("top", "wrist"), d_state=4, d_action=4, resize=(96, 96), n_action_steps=4,
        max_text=16, tokenizer="tabletop",
    ),
)  # fmt: skip
