"""ACT: one ResNet-18 for all cameras, four encoder layers and one decoder layer; a hundred actions at once."""

from dataclasses import replace

from hooked_vla.spec import (
    CheckpointSpec,
    ChunkTransformerSpec,
    EncoderDecoderSpec,
    FeatureSpec,
    LatentSpec,
    ResNetSpec,
    Split,
)

SPEC = ChunkTransformerSpec(
    name="act",
    family="act",
    config_type="act",
    description="ResNet-18 features and state through a DETR-like encoder–decoder to 100 actions in one pass",
    paper="https://arxiv.org/abs/2304.13705",
    licence="Apache-2.0",
    source="LeRobot 0.6.1 policies/act",
    n_parameters=51_613_582,
    checkpoints=(
        CheckpointSpec("lerobot/act_aloha_sim_transfer_cube_human", "simulated ALOHA, cube transfer: one camera"),
        CheckpointSpec("lerobot/act_aloha_sim_insertion_human", "simulated ALOHA, peg insertion: one camera"),
    ),
    vision=ResNetSpec(
        image_size=(480, 640), widths=(64, 128, 256, 512), n_blocks=(2, 2, 2, 2), norm="frozen_batch", eps=1e-5,
    ),
    transformer=EncoderDecoderSpec(
        d_model=512, n_heads=8, d_mlp=3200, n_encoder_layers=4, n_decoder_layers=1, act="relu", eps=1e-5,
        pre_norm=False,
    ),
    latent=LatentSpec(d_latent=32, n_vae_layers=4),
    chunk=100,
    features=FeatureSpec(
        cameras=("c0", "c1"), d_state=14, d_action=14, resize=None, empty_cameras=0, n_action_steps=100,
        max_text=0, pad_text="longest", tokenizer="",
        normalization={"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    ),
    # running statistics lose too much in bfloat16
    fp32=("vision",),
    keys={
        "model.backbone.": {
            "conv1.weight": "vision.conv1.weight",
            "bn1.weight": "vision.norm1.weight",
            "bn1.bias": "vision.norm1.bias",
            "bn1.running_mean": "vision.norm1.running_mean",
            "bn1.running_var": "vision.norm1.running_var",
            # the public layout numbers stages from 1
            "layer{+1}.{}.conv1.weight": "vision.stages.{}.{}.conv1.weight",
            "layer{+1}.{}.bn1.weight": "vision.stages.{}.{}.norm1.weight",
            "layer{+1}.{}.bn1.bias": "vision.stages.{}.{}.norm1.bias",
            "layer{+1}.{}.bn1.running_mean": "vision.stages.{}.{}.norm1.running_mean",
            "layer{+1}.{}.bn1.running_var": "vision.stages.{}.{}.norm1.running_var",
            "layer{+1}.{}.conv2.weight": "vision.stages.{}.{}.conv2.weight",
            "layer{+1}.{}.bn2.weight": "vision.stages.{}.{}.norm2.weight",
            "layer{+1}.{}.bn2.bias": "vision.stages.{}.{}.norm2.bias",
            "layer{+1}.{}.bn2.running_mean": "vision.stages.{}.{}.norm2.running_mean",
            "layer{+1}.{}.bn2.running_var": "vision.stages.{}.{}.norm2.running_var",
            "layer{+1}.{}.downsample.0.weight": "vision.stages.{}.{}.shortcut_conv.weight",
            "layer{+1}.{}.downsample.1.weight": "vision.stages.{}.{}.shortcut_norm.weight",
            "layer{+1}.{}.downsample.1.bias": "vision.stages.{}.{}.shortcut_norm.bias",
            "layer{+1}.{}.downsample.1.running_mean": "vision.stages.{}.{}.shortcut_norm.running_mean",
            "layer{+1}.{}.downsample.1.running_var": "vision.stages.{}.{}.shortcut_norm.running_var",
        },
        "model.encoder.": {
            "layers.{}.self_attn.in_proj_weight": Split((
                "encoder.blocks.{}.attn.q_proj.weight",
                "encoder.blocks.{}.attn.k_proj.weight",
                "encoder.blocks.{}.attn.v_proj.weight",
            )),
            "layers.{}.self_attn.in_proj_bias": Split((
                "encoder.blocks.{}.attn.q_proj.bias",
                "encoder.blocks.{}.attn.k_proj.bias",
                "encoder.blocks.{}.attn.v_proj.bias",
            )),
            "layers.{}.self_attn.out_proj.weight": "encoder.blocks.{}.attn.o_proj.weight",
            "layers.{}.self_attn.out_proj.bias": "encoder.blocks.{}.attn.o_proj.bias",
            "layers.{}.linear1.weight": "encoder.blocks.{}.mlp.up_proj.weight",
            "layers.{}.linear1.bias": "encoder.blocks.{}.mlp.up_proj.bias",
            "layers.{}.linear2.weight": "encoder.blocks.{}.mlp.down_proj.weight",
            "layers.{}.linear2.bias": "encoder.blocks.{}.mlp.down_proj.bias",
            # post-norm, or pre-norm where config.json says pre_norm
            "layers.{}.norm1.weight": ("encoder.blocks.{}.ln1_post.weight", "encoder.blocks.{}.ln1.weight"),
            "layers.{}.norm1.bias": ("encoder.blocks.{}.ln1_post.bias", "encoder.blocks.{}.ln1.bias"),
            "layers.{}.norm2.weight": ("encoder.blocks.{}.ln2_post.weight", "encoder.blocks.{}.ln2.weight"),
            "layers.{}.norm2.bias": ("encoder.blocks.{}.ln2_post.bias", "encoder.blocks.{}.ln2.bias"),
            "norm.weight": "encoder.ln_final.weight",
            "norm.bias": "encoder.ln_final.bias",
        },
        "model.decoder.": {
            "layers.{}.self_attn.in_proj_weight": Split((
                "expert.blocks.{}.attn.q_proj.weight",
                "expert.blocks.{}.attn.k_proj.weight",
                "expert.blocks.{}.attn.v_proj.weight",
            )),
            "layers.{}.self_attn.in_proj_bias": Split((
                "expert.blocks.{}.attn.q_proj.bias",
                "expert.blocks.{}.attn.k_proj.bias",
                "expert.blocks.{}.attn.v_proj.bias",
            )),
            "layers.{}.self_attn.out_proj.weight": "expert.blocks.{}.attn.o_proj.weight",
            "layers.{}.self_attn.out_proj.bias": "expert.blocks.{}.attn.o_proj.bias",
            "layers.{}.multihead_attn.in_proj_weight": Split((
                "expert.blocks.{}.cross_attn.q_proj.weight",
                "expert.blocks.{}.cross_attn.k_proj.weight",
                "expert.blocks.{}.cross_attn.v_proj.weight",
            )),
            "layers.{}.multihead_attn.in_proj_bias": Split((
                "expert.blocks.{}.cross_attn.q_proj.bias",
                "expert.blocks.{}.cross_attn.k_proj.bias",
                "expert.blocks.{}.cross_attn.v_proj.bias",
            )),
            "layers.{}.multihead_attn.out_proj.weight": "expert.blocks.{}.cross_attn.o_proj.weight",
            "layers.{}.multihead_attn.out_proj.bias": "expert.blocks.{}.cross_attn.o_proj.bias",
            "layers.{}.linear1.weight": "expert.blocks.{}.mlp.up_proj.weight",
            "layers.{}.linear1.bias": "expert.blocks.{}.mlp.up_proj.bias",
            "layers.{}.linear2.weight": "expert.blocks.{}.mlp.down_proj.weight",
            "layers.{}.linear2.bias": "expert.blocks.{}.mlp.down_proj.bias",
            "layers.{}.norm1.weight": ("expert.blocks.{}.ln1_post.weight", "expert.blocks.{}.ln1.weight"),
            "layers.{}.norm1.bias": ("expert.blocks.{}.ln1_post.bias", "expert.blocks.{}.ln1.bias"),
            "layers.{}.norm2.weight": ("expert.blocks.{}.ln_cross_post.weight", "expert.blocks.{}.ln_cross.weight"),
            "layers.{}.norm2.bias": ("expert.blocks.{}.ln_cross_post.bias", "expert.blocks.{}.ln_cross.bias"),
            "layers.{}.norm3.weight": ("expert.blocks.{}.ln2_post.weight", "expert.blocks.{}.ln2.weight"),
            "layers.{}.norm3.bias": ("expert.blocks.{}.ln2_post.bias", "expert.blocks.{}.ln2.bias"),
            "norm.weight": "expert.ln_final.weight",
            "norm.bias": "expert.ln_final.bias",
        },
        "model.": {
            "encoder_img_feat_input_proj.weight": "connector.proj.weight",
            "encoder_img_feat_input_proj.bias": "connector.proj.bias",
            "encoder_latent_input_proj.weight": "encoder.latent_proj.weight",
            "encoder_latent_input_proj.bias": "encoder.latent_proj.bias",
            "encoder_robot_state_input_proj.weight": "encoder.state_proj.weight",
            "encoder_robot_state_input_proj.bias": "encoder.state_proj.bias",
            "encoder_env_state_input_proj.weight": "encoder.environment_proj.weight",
            "encoder_env_state_input_proj.bias": "encoder.environment_proj.bias",
            "encoder_1d_feature_pos_embed.weight": "encoder.pos_embed.weight",
            "decoder_pos_embed.weight": "expert.pos_embed.weight",
            "action_head.weight": "head.proj.weight",
            "action_head.bias": "head.proj.bias",
        },
        # training only
        "model.vae_encoder": {
            ".layers.{}.self_attn.in_proj_weight": "vae.layers.{}.self_attn.in_proj_weight",
            ".layers.{}.self_attn.in_proj_bias": "vae.layers.{}.self_attn.in_proj_bias",
            ".layers.{}.self_attn.out_proj.weight": "vae.layers.{}.self_attn.out_proj.weight",
            ".layers.{}.self_attn.out_proj.bias": "vae.layers.{}.self_attn.out_proj.bias",
            ".layers.{}.linear1.weight": "vae.layers.{}.linear1.weight",
            ".layers.{}.linear1.bias": "vae.layers.{}.linear1.bias",
            ".layers.{}.linear2.weight": "vae.layers.{}.linear2.weight",
            ".layers.{}.linear2.bias": "vae.layers.{}.linear2.bias",
            ".layers.{}.norm1.weight": "vae.layers.{}.norm1.weight",
            ".layers.{}.norm1.bias": "vae.layers.{}.norm1.bias",
            ".layers.{}.norm2.weight": "vae.layers.{}.norm2.weight",
            ".layers.{}.norm2.bias": "vae.layers.{}.norm2.bias",
            ".norm.weight": "vae.norm.weight",
            ".norm.bias": "vae.norm.bias",
            "_cls_embed.weight": "vae.cls_embed.weight",
            "_robot_state_input_proj.weight": "vae.state_proj.weight",
            "_robot_state_input_proj.bias": "vae.state_proj.bias",
            "_action_input_proj.weight": "vae.action_proj.weight",
            "_action_input_proj.bias": "vae.action_proj.bias",
            "_latent_output_proj.weight": "vae.out_proj.weight",
            "_latent_output_proj.bias": "vae.out_proj.bias",
            "_pos_enc": "vae.pos_enc",
        },
    },
)  # fmt: skip

# the same wiring at a size that runs in milliseconds: for tests, tutorials and the demo, with random weights
TINY = replace(
    SPEC,
    vision=replace(SPEC.vision, image_size=(64, 64), widths=(16, 16, 32, 32), n_blocks=(1, 1, 1, 1)),
    transformer=replace(
        SPEC.transformer, d_model=32, n_heads=4, d_mlp=48, n_encoder_layers=2, n_decoder_layers=2
    ),
    latent=LatentSpec(d_latent=8, n_vae_layers=1),
    chunk=8,
    features=replace(
        SPEC.features, cameras=("agent", "wrist"), d_state=4, d_action=4, n_action_steps=8, normalization={}
    ),
)  # fmt: skip

# the same wiring, as small as acts on the tabletop
TABLETOP = replace(
    SPEC,
    vision=replace(SPEC.vision, image_size=(96, 96), widths=(24, 48, 96, 128), n_blocks=(1, 1, 1, 1)),
    transformer=replace(SPEC.transformer, d_model=128, n_heads=4, d_mlp=256, n_encoder_layers=4, n_decoder_layers=1),
    latent=LatentSpec(d_latent=16, n_vae_layers=2),
    chunk=8,
    features=replace(
        SPEC.features, cameras=("top", "wrist"), d_state=4, d_action=4, n_action_steps=4,
        # pixels as they are: the tower learned them so
        normalization={"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
    ),
)  # fmt: skip
