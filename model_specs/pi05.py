"""π0.5: π0's wiring, the state told in the prompt and the time through the expert's adaptive norms."""

from dataclasses import replace

from hooked_vla.spec import CheckpointSpec, DecoderSpec, FeatureSpec, FlowSpec, JointFlowVLASpec, VisionSpec

SPEC = JointFlowVLASpec(
    name="pi05",
    family="pi",
    config_type="pi05",
    description="SigLIP-So400m/14, Gemma 2B, and a 300M expert in joint attention; time through adaptive norms",
    paper="https://arxiv.org/abs/2504.16054",
    licence="Gemma",
    source="LeRobot 0.6.1 policies/pi05, openpi models_pytorch",
    n_parameters=3_616_757_520,
    checkpoints=(
        CheckpointSpec("lerobot/pi05_base", "base, openpi's weights"),
        CheckpointSpec("lerobot/pi05_libero_base", "LIBERO, openpi's weights"),
        CheckpointSpec("lerobot/pi05_libero_finetuned_v044", "LIBERO fine-tune, LeRobot 0.4.4; MEAN_STD"),
    ),
    vision=VisionSpec(
        image_size=224, patch_size=14, d_model=1152, n_layers=27, n_heads=16, d_mlp=4304,
        act="gelu_pytorch_tanh", eps=1e-6,
    ),
    vlm=DecoderSpec(
        d_model=2048, n_layers=18, n_heads=8, n_kv_heads=1, d_head=256, d_mlp=16384,
        act="gelu_pytorch_tanh", eps=1e-6, rope_base=10_000.0, d_vocab=257152,
    ),
    expert=DecoderSpec(
        d_model=1024, n_layers=18, n_heads=8, n_kv_heads=1, d_head=256, d_mlp=4096,
        act="gelu_pytorch_tanh", eps=1e-6, rope_base=10_000.0, d_vocab=257152,
    ),
    flow=FlowSpec(n_steps=10, chunk=50, d_action=32, d_state=32, min_period=4e-3, max_period=4.0),
    template="Task: {task}, State: {state};\nAction: ",
    state_input="text",
    time_input="adaptive_norm",
    features=FeatureSpec(
        cameras=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"), d_state=32, d_action=32, resize=(224, 224),
        empty_cameras=0, n_action_steps=50, max_text=200, pad_text="max_length",
        tokenizer="google/paligemma-3b-pt-224",
        normalization={"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
    ),
    fp32=("vision", "connector", "vlm.blocks.{}.ln1", "vlm.blocks.{}.ln2", "vlm.ln_final", "expert.blocks.{}.ln1",
          "expert.blocks.{}.ln2", "expert.ln_final", "expert.action_in_proj", "expert.time_mlp_in",
          "expert.time_mlp_out", "expert.action_out_proj"),
    tied={"vlm.embed.weight": "vlm.unembed.weight"},
    keys={
        # with and without the leading "model." of LeRobot's training, and the infix that newer transformers drop
        (
            "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.|"
            "paligemma_with_expert.paligemma.model.vision_tower.vision_model.|"
            "model.paligemma_with_expert.paligemma.model.vision_tower.|"
            "paligemma_with_expert.paligemma.model.vision_tower."
        ): {
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
        "model.paligemma_with_expert.paligemma.|paligemma_with_expert.paligemma.": {
            "model.multi_modal_projector.linear.weight": "connector.proj.weight",
            "model.multi_modal_projector.linear.bias": "connector.proj.bias",
            "lm_head.weight": "vlm.unembed.weight",
        },
        (
            "model.paligemma_with_expert.paligemma.model.language_model.|"
            "paligemma_with_expert.paligemma.model.language_model."
        ): {
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
        # checkpoints converted from another wiring may hold plain norms too
        "model.paligemma_with_expert.gemma_expert.model.|paligemma_with_expert.gemma_expert.model.": {
            "layers.{}.input_layernorm.dense.weight": "expert.blocks.{}.ln1.linear.weight",
            "layers.{}.input_layernorm.dense.bias": "expert.blocks.{}.ln1.linear.bias",
            "layers.{}.self_attn.q_proj.weight": "expert.blocks.{}.attn.q_proj.weight",
            "layers.{}.self_attn.k_proj.weight": "expert.blocks.{}.attn.k_proj.weight",
            "layers.{}.self_attn.v_proj.weight": "expert.blocks.{}.attn.v_proj.weight",
            "layers.{}.self_attn.o_proj.weight": "expert.blocks.{}.attn.o_proj.weight",
            "layers.{}.post_attention_layernorm.dense.weight": "expert.blocks.{}.ln2.linear.weight",
            "layers.{}.post_attention_layernorm.dense.bias": "expert.blocks.{}.ln2.linear.bias",
            "layers.{}.mlp.gate_proj.weight": "expert.blocks.{}.mlp.gate_proj.weight",
            "layers.{}.mlp.up_proj.weight": "expert.blocks.{}.mlp.up_proj.weight",
            "layers.{}.mlp.down_proj.weight": "expert.blocks.{}.mlp.down_proj.weight",
            "norm.dense.weight": "expert.ln_final.linear.weight",
            "norm.dense.bias": "expert.ln_final.linear.bias",
            "layers.{}.input_layernorm.weight": None,
            "layers.{}.post_attention_layernorm.weight": None,
            "norm.weight": None,
        },
        "model.paligemma_with_expert.gemma_expert.|paligemma_with_expert.gemma_expert.": {
            "lm_head.weight": "expert.unembed.weight",
        },
        "model.|": {
            "action_in_proj.weight": "expert.action_in_proj.weight",
            "action_in_proj.bias": "expert.action_in_proj.bias",
            "time_mlp_in.weight": "expert.time_mlp_in.weight",
            "time_mlp_in.bias": "expert.time_mlp_in.bias",
            "time_mlp_out.weight": "expert.time_mlp_out.weight",
            "time_mlp_out.bias": "expert.time_mlp_out.bias",
            "action_out_proj.weight": "expert.action_out_proj.weight",
            "action_out_proj.bias": "expert.action_out_proj.bias",
            "state_proj.weight": None,
            "state_proj.bias": None,
        },
    },
)  # fmt: skip

# the same wiring at a size that runs in milliseconds: for tests, tutorials and the demo, with random weights
TINY = replace(
    SPEC,
    vision=replace(SPEC.vision, image_size=56, patch_size=14, d_model=48, n_layers=2, n_heads=3, d_mlp=96),
    vlm=replace(SPEC.vlm, d_model=64, n_layers=3, n_heads=4, n_kv_heads=1, d_head=16, d_mlp=128, d_vocab=258),
    expert=replace(SPEC.expert, d_model=48, n_layers=3, n_heads=4, n_kv_heads=1, d_head=16, d_mlp=96, d_vocab=None),
    flow=replace(SPEC.flow, n_steps=4, chunk=8, d_action=8, d_state=8),
    features=replace(
        SPEC.features, cameras=("agent", "wrist"), d_state=4, d_action=4, resize=(56, 56), n_action_steps=8,
        max_text=128, pad_text="longest", tokenizer="bytes", normalization={},
    ),
)  # fmt: skip

# a size that learns the tabletop on a CPU: 96-pixel cameras in 16 tokens each, one token a word or number
TABLETOP = replace(
    SPEC,
    vision=replace(SPEC.vision, image_size=96, patch_size=24, d_model=128, n_layers=3, n_heads=4, d_mlp=384),
    vlm=replace(SPEC.vlm, d_model=128, n_layers=4, n_heads=4, n_kv_heads=1, d_head=32, d_mlp=256, d_vocab=384),
    expert=replace(SPEC.expert, d_model=96, n_layers=4, n_heads=4, n_kv_heads=1, d_head=32, d_mlp=192, d_vocab=None),
    flow=replace(SPEC.flow, chunk=8, d_action=4, d_state=4),
    features=replace(
        SPEC.features, cameras=("top", "wrist"), d_state=4, d_action=4, resize=(96, 96), n_action_steps=4,
        max_text=32, tokenizer="tabletop",
    ),
)  # fmt: skip
