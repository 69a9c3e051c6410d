"""π0-FAST: PaliGemma (SigLIP-So400m, Gemma 2B) that generates the actions as FAST tokens."""

from dataclasses import replace

from hooked_vla.spec import CheckpointSpec, DecoderSpec, FastSpec, FastVLASpec, FeatureSpec, VisionSpec

SPEC = FastVLASpec(
    name="pi0_fast",
    family="pi_fast",
    config_type="pi0_fast",
    description="SigLIP-So400m/14 and Gemma 2B, which generates FAST action tokens after a prefix without causality",
    paper="https://arxiv.org/abs/2501.09747",
    licence="Gemma",
    source="LeRobot 0.6.1 policies/pi0_fast",
    n_parameters=3_449_982_704,
    checkpoints=(CheckpointSpec("lerobot/pi0fast-base", "base, openpi's weights"),),
    vision=VisionSpec(
        image_size=224, patch_size=14, d_model=1152, n_layers=27, n_heads=16, d_mlp=4304,
        act="gelu_pytorch_tanh", eps=1e-6,
    ),
    vlm=DecoderSpec(
        d_model=2048, n_layers=18, n_heads=8, n_kv_heads=1, d_head=256, d_mlp=16384,
        act="gelu_pytorch_tanh", eps=1e-6, rope_base=10_000.0, d_vocab=257152,
    ),
    template="Task: {task}, State: {state};\n",
    # ids of "<bos>" and "|" in PaliGemma's vocabulary
    fast=FastSpec(
        max_tokens=256, start=2, end=235371, skip=128, tokenizer="lerobot/fast-action-tokenizer", prefix="Action: ",
        required=True,
    ),
    d_state=32,
    d_action=32,
    chunk=50,
    features=FeatureSpec(
        cameras=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"), d_state=32, d_action=32, resize=(224, 224),
        empty_cameras=0, n_action_steps=50, max_text=200, pad_text="max_length",
        tokenizer="google/paligemma-3b-pt-224",
        normalization={"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    ),
    fp32=("vision", "connector", "vlm.blocks.{}.ln1", "vlm.blocks.{}.ln2", "vlm.ln_final", "decode.blocks.{}.ln1",
          "decode.blocks.{}.ln2", "decode.ln_final"),
    tied={
        "decode.blocks.{}.attn.q_proj.weight": "vlm.blocks.{}.attn.q_proj.weight",
        "decode.blocks.{}.attn.k_proj.weight": "vlm.blocks.{}.attn.k_proj.weight",
        "decode.blocks.{}.attn.v_proj.weight": "vlm.blocks.{}.attn.v_proj.weight",
        "decode.blocks.{}.attn.o_proj.weight": "vlm.blocks.{}.attn.o_proj.weight",
        "decode.blocks.{}.ln1.weight": "vlm.blocks.{}.ln1.weight",
        "decode.blocks.{}.ln2.weight": "vlm.blocks.{}.ln2.weight",
        "decode.blocks.{}.mlp.gate_proj.weight": "vlm.blocks.{}.mlp.gate_proj.weight",
        "decode.blocks.{}.mlp.up_proj.weight": "vlm.blocks.{}.mlp.up_proj.weight",
        "decode.blocks.{}.mlp.down_proj.weight": "vlm.blocks.{}.mlp.down_proj.weight",
        "decode.ln_final.weight": "vlm.ln_final.weight",
    },
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
    },
)  # fmt: skip

# the same wiring at a size that runs in milliseconds: for tests, tutorials and the demo, with random weights; its
# text tokens are bytes (91 is "|"), 257 starts the actions, and an action token is a coefficient
TINY = replace(
    SPEC,
    vision=replace(SPEC.vision, image_size=56, patch_size=14, d_model=48, n_layers=2, n_heads=3, d_mlp=96),
    vlm=replace(SPEC.vlm, d_model=64, n_layers=3, n_heads=4, n_kv_heads=1, d_head=16, d_mlp=128, d_vocab=768),
    fast=replace(SPEC.fast, max_tokens=12, start=257, end=91, tokenizer="bytes", required=False),
    d_state=8,
    d_action=8,
    chunk=8,
    features=replace(
        SPEC.features, cameras=("agent", "wrist"), d_state=4, d_action=4, resize=(56, 56), n_action_steps=8,
        max_text=128, pad_text="longest", tokenizer="bytes", normalization={},
    ),
)  # fmt: skip
