"""GR00T N1.5: Eagle 2.5 (SigLIP and the first 12 of Qwen3-1.7B's 28 layers), an adapter, and a 16-block DiT."""

from dataclasses import replace

from hooked_vla.spec import (
    AdapterSpec,
    ChatSpec,
    CheckpointSpec,
    DecoderSpec,
    DiTSpec,
    EmbodimentFlowSpec,
    FeatureSpec,
    FeatureVLASpec,
    VisionSpec,
)

SPEC = FeatureVLASpec(
    name="groot_n15",
    family="groot",
    config_type="gr00t_n1_5|groot",
    description="SigLIP-So400m, 12 layers of Qwen3-1.7B, and a DiT that alternates cross- and self-attention",
    paper="https://arxiv.org/abs/2503.14734",
    licence="code Apache-2.0; weights under NVIDIA's licence, see the checkpoint",
    source="LeRobot 0.5.1 policies/groot",
    n_parameters=2_413_522_880,
    checkpoints=(
        CheckpointSpec("nvidia/GR00T-N1.5-3B", "base, 32 embodiments"),
    ),
    vision=VisionSpec(
        image_size=224, patch_size=14, d_model=1152, n_layers=27, n_heads=16, d_mlp=4304,
        act="gelu_pytorch_tanh", eps=1e-6,
    ),
    vision_pool=True,
    vlm=DecoderSpec(
        d_model=2048, n_layers=12, n_heads=16, n_kv_heads=8, d_head=128, d_mlp=6144,
        act="silu", eps=1e-6, rope_base=1_000_000.0, d_vocab=151_680,
    ),
    rope_sections=(),
    final_norm=True,
    padding_attends_evenly=False,
    image_token=151_669,
    adapter=AdapterSpec(n_layers=4, n_heads=32, d_head=64, d_mlp=8192, act="gelu_pytorch_tanh", eps=1e-5),
    expert=DiTSpec(
        schedule=("cross", "self") * 8, d_model=1536, n_heads=32, d_head=48, d_mlp=6144, d_out=1024,
        act="gelu_pytorch_tanh", eps=1e-5, eps_ada=1e-5, eps_final=1e-6,
    ),
    flow=EmbodimentFlowSpec(
        n_steps=4, chunk=16, d_action=32, d_state=64, n_state_steps=1, n_buckets=1000, n_embodiments=32, embodiment=31,
        d_hidden=1024, n_future=32, n_positions=1024,
        # (0.999 - beta) / 0.999
        train_times=(1.0, -0.001 / 0.999),
    ),
    chat=ChatSpec(
        start="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        image_start="<image {}><img>", image_end="</img>", end="<|im_end|>\n<|im_start|>assistant\n",
        listed=True, formal=False, crop=1.0, pixels=None,
    ),
    features=FeatureSpec(
        cameras=(), d_state=64, d_action=32, resize=(224, 224), empty_cameras=0, n_action_steps=16,
        max_text=4096, pad_text="longest", tokenizer="lerobot/eagle2hg-processor-groot-n1p5",
        normalization={"STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
    ),
    tied={"vlm.unembed.weight": "vlm.embed.weight"},
    keys={
        "backbone.eagle_model.vision_model.vision_model.|"
        "_groot_model.backbone.eagle_model.vision_model.vision_model.": {
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
            "head.probe": "vision.pool.probe",
            "head.attention.in_proj_weight": "vision.pool.attention.in_proj_weight",
            "head.attention.in_proj_bias": "vision.pool.attention.in_proj_bias",
            "head.attention.out_proj.weight": "vision.pool.attention.out_proj.weight",
            "head.attention.out_proj.bias": "vision.pool.attention.out_proj.bias",
            "head.layernorm.weight": "vision.pool.ln.weight",
            "head.layernorm.bias": "vision.pool.ln.bias",
            "head.mlp.fc1.weight": "vision.pool.up_proj.weight",
            "head.mlp.fc1.bias": "vision.pool.up_proj.bias",
            "head.mlp.fc2.weight": "vision.pool.down_proj.weight",
            "head.mlp.fc2.bias": "vision.pool.down_proj.bias",
        },
        "backbone.eagle_model.mlp1.|_groot_model.backbone.eagle_model.mlp1.": {
            "0.weight": "connector.proj.weight",
            "0.bias": "connector.proj.bias",
        },
        "backbone.eagle_model.language_model.|_groot_model.backbone.eagle_model.language_model.": {
            "model.embed_tokens.weight": "vlm.embed.weight",
            "model.layers.{}.input_layernorm.weight": "vlm.blocks.{}.ln1.weight",
            "model.layers.{}.self_attn.q_proj.weight": "vlm.blocks.{}.attn.q_proj.weight",
            "model.layers.{}.self_attn.k_proj.weight": "vlm.blocks.{}.attn.k_proj.weight",
            "model.layers.{}.self_attn.v_proj.weight": "vlm.blocks.{}.attn.v_proj.weight",
            "model.layers.{}.self_attn.o_proj.weight": "vlm.blocks.{}.attn.o_proj.weight",
            "model.layers.{}.self_attn.q_norm.weight": "vlm.blocks.{}.attn.q_norm.weight",
            "model.layers.{}.self_attn.k_norm.weight": "vlm.blocks.{}.attn.k_norm.weight",
            "model.layers.{}.post_attention_layernorm.weight": "vlm.blocks.{}.ln2.weight",
            "model.layers.{}.mlp.gate_proj.weight": "vlm.blocks.{}.mlp.gate_proj.weight",
            "model.layers.{}.mlp.up_proj.weight": "vlm.blocks.{}.mlp.up_proj.weight",
            "model.layers.{}.mlp.down_proj.weight": "vlm.blocks.{}.mlp.down_proj.weight",
            "model.norm.weight": "vlm.ln_final.weight",
            "lm_head.weight": "vlm.unembed.weight",
        },
        "action_head.|_groot_model.action_head.": {
            "vlln.weight": "adapter.ln_pre.weight",
            "vlln.bias": "adapter.ln_pre.bias",
            "vl_self_attention.transformer_blocks.{}.norm1.weight": "adapter.blocks.{}.ln1.weight",
            "vl_self_attention.transformer_blocks.{}.norm1.bias": "adapter.blocks.{}.ln1.bias",
            "vl_self_attention.transformer_blocks.{}.attn1.to_q.weight": "adapter.blocks.{}.attn.q_proj.weight",
            "vl_self_attention.transformer_blocks.{}.attn1.to_q.bias": "adapter.blocks.{}.attn.q_proj.bias",
            "vl_self_attention.transformer_blocks.{}.attn1.to_k.weight": "adapter.blocks.{}.attn.k_proj.weight",
            "vl_self_attention.transformer_blocks.{}.attn1.to_k.bias": "adapter.blocks.{}.attn.k_proj.bias",
            "vl_self_attention.transformer_blocks.{}.attn1.to_v.weight": "adapter.blocks.{}.attn.v_proj.weight",
            "vl_self_attention.transformer_blocks.{}.attn1.to_v.bias": "adapter.blocks.{}.attn.v_proj.bias",
            "vl_self_attention.transformer_blocks.{}.attn1.to_out.0.weight": "adapter.blocks.{}.attn.o_proj.weight",
            "vl_self_attention.transformer_blocks.{}.attn1.to_out.0.bias": "adapter.blocks.{}.attn.o_proj.bias",
            "vl_self_attention.transformer_blocks.{}.norm3.weight": "adapter.blocks.{}.ln2.weight",
            "vl_self_attention.transformer_blocks.{}.norm3.bias": "adapter.blocks.{}.ln2.bias",
            "vl_self_attention.transformer_blocks.{}.ff.net.0.proj.weight": "adapter.blocks.{}.mlp.up_proj.weight",
            "vl_self_attention.transformer_blocks.{}.ff.net.0.proj.bias": "adapter.blocks.{}.mlp.up_proj.bias",
            "vl_self_attention.transformer_blocks.{}.ff.net.2.weight": "adapter.blocks.{}.mlp.down_proj.weight",
            "vl_self_attention.transformer_blocks.{}.ff.net.2.bias": "adapter.blocks.{}.mlp.down_proj.bias",
            "state_encoder.layer1.W": "expert.state_encoder.layer1.W",
            "state_encoder.layer1.b": "expert.state_encoder.layer1.b",
            "state_encoder.layer2.W": "expert.state_encoder.layer2.W",
            "state_encoder.layer2.b": "expert.state_encoder.layer2.b",
            "action_encoder.W1.W": "expert.action_in_proj.W",
            "action_encoder.W1.b": "expert.action_in_proj.b",
            "action_encoder.W2.W": "expert.action_time_in.W",
            "action_encoder.W2.b": "expert.action_time_in.b",
            "action_encoder.W3.W": "expert.action_time_out.W",
            "action_encoder.W3.b": "expert.action_time_out.b",
            "action_decoder.layer1.W": "expert.action_decoder.layer1.W",
            "action_decoder.layer1.b": "expert.action_decoder.layer1.b",
            "action_decoder.layer2.W": "expert.action_decoder.layer2.W",
            "action_decoder.layer2.b": "expert.action_decoder.layer2.b",
            "future_tokens.weight": "expert.future.weight",
            "position_embedding.weight": "expert.pos_embed.weight",
            "model.timestep_encoder.timestep_embedder.linear_1.weight": "expert.time_mlp_in.weight",
            "model.timestep_encoder.timestep_embedder.linear_1.bias": "expert.time_mlp_in.bias",
            "model.timestep_encoder.timestep_embedder.linear_2.weight": "expert.time_mlp_out.weight",
            "model.timestep_encoder.timestep_embedder.linear_2.bias": "expert.time_mlp_out.bias",
            # a block's attention is `cross_attn` or `attn`, whichever the schedule built
            "model.transformer_blocks.{}.norm1.linear.weight": "expert.blocks.{}.ln1.linear.weight",
            "model.transformer_blocks.{}.norm1.linear.bias": "expert.blocks.{}.ln1.linear.bias",
            "model.transformer_blocks.{}.attn1.to_q.weight": (
                "expert.blocks.{}.cross_attn.q_proj.weight", "expert.blocks.{}.attn.q_proj.weight",
            ),
            "model.transformer_blocks.{}.attn1.to_q.bias": (
                "expert.blocks.{}.cross_attn.q_proj.bias", "expert.blocks.{}.attn.q_proj.bias",
            ),
            "model.transformer_blocks.{}.attn1.to_k.weight": (
                "expert.blocks.{}.cross_attn.k_proj.weight", "expert.blocks.{}.attn.k_proj.weight",
            ),
            "model.transformer_blocks.{}.attn1.to_k.bias": (
                "expert.blocks.{}.cross_attn.k_proj.bias", "expert.blocks.{}.attn.k_proj.bias",
            ),
            "model.transformer_blocks.{}.attn1.to_v.weight": (
                "expert.blocks.{}.cross_attn.v_proj.weight", "expert.blocks.{}.attn.v_proj.weight",
            ),
            "model.transformer_blocks.{}.attn1.to_v.bias": (
                "expert.blocks.{}.cross_attn.v_proj.bias", "expert.blocks.{}.attn.v_proj.bias",
            ),
            "model.transformer_blocks.{}.attn1.to_out.0.weight": (
                "expert.blocks.{}.cross_attn.o_proj.weight", "expert.blocks.{}.attn.o_proj.weight",
            ),
            "model.transformer_blocks.{}.attn1.to_out.0.bias": (
                "expert.blocks.{}.cross_attn.o_proj.bias", "expert.blocks.{}.attn.o_proj.bias",
            ),
            "model.transformer_blocks.{}.ff.net.0.proj.weight": "expert.blocks.{}.mlp.up_proj.weight",
            "model.transformer_blocks.{}.ff.net.0.proj.bias": "expert.blocks.{}.mlp.up_proj.bias",
            "model.transformer_blocks.{}.ff.net.2.weight": "expert.blocks.{}.mlp.down_proj.weight",
            "model.transformer_blocks.{}.ff.net.2.bias": "expert.blocks.{}.mlp.down_proj.bias",
            "model.proj_out_1.weight": "expert.ln_final.linear.weight",
            "model.proj_out_1.bias": "expert.ln_final.linear.bias",
            "model.proj_out_2.weight": "expert.out_proj.weight",
            "model.proj_out_2.bias": "expert.out_proj.bias",
        },
    },
)  # fmt: skip

# the same wiring at a size that runs in milliseconds: for tests, tutorials and the demo, with random weights
TINY = replace(
    SPEC,
    vision=replace(SPEC.vision, image_size=56, d_model=48, n_layers=2, n_heads=3, d_mlp=96),
    vlm=replace(SPEC.vlm, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, d_head=16, d_mlp=96, d_vocab=260),
    image_token=258,
    adapter=AdapterSpec(n_layers=2, n_heads=4, d_head=16, d_mlp=128, act="gelu_pytorch_tanh", eps=1e-5),
    expert=replace(
        SPEC.expert, schedule=("cross", "self") * 2, d_model=48, n_heads=4, d_head=12, d_mlp=96, d_out=32
    ),
    flow=replace(
        SPEC.flow, chunk=8, d_action=8, d_state=12, n_embodiments=4, embodiment=3, d_hidden=32, n_future=4,
        n_positions=16,
    ),
    features=replace(
        SPEC.features, cameras=("agent", "wrist"), d_state=4, d_action=4, resize=(56, 56), n_action_steps=8,
        max_text=512, tokenizer="bytes", normalization={},
    ),
)  # fmt: skip

# a size that learns the tabletop on a CPU: 96-pixel cameras in 16 tokens each, one token a word, one embodiment
TABLETOP = replace(
    SPEC,
    vision=replace(SPEC.vision, image_size=96, patch_size=24, d_model=128, n_layers=3, n_heads=4, d_mlp=384),
    vision_pool=False,
    vlm=replace(SPEC.vlm, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, d_head=32, d_mlp=192, d_vocab=160),
    # the last word, as packaging lays them out
    image_token=159,
    adapter=AdapterSpec(n_layers=2, n_heads=4, d_head=32, d_mlp=192, act="gelu_pytorch_tanh", eps=1e-5),
    expert=replace(
        SPEC.expert, schedule=("cross", "self") * 2, d_model=96, n_heads=4, d_head=24, d_mlp=192, d_out=96
    ),
    flow=replace(
        SPEC.flow, chunk=8, d_action=4, d_state=4, n_embodiments=1, embodiment=0, d_hidden=96, n_future=4,
        n_positions=16,
    ),
    features=replace(
        SPEC.features, cameras=("top", "wrist"), d_state=4, d_action=4, resize=(96, 96), n_action_steps=4,
        max_text=88, pad_text="max_length", tokenizer="tabletop",
    ),
)  # fmt: skip
