"""VQ-BeT: ResNet-18 keypoints and states of five steps, eight causal layers, and two codebooks of 16 action codes."""

from dataclasses import replace

from hooked_vla.spec import (
    CausalSpec,
    CheckpointSpec,
    CodePolicySpec,
    CodeSpec,
    FeatureSpec,
    KeypointSpec,
    ResNetSpec,
    Split,
)

SPEC = CodePolicySpec(
    name="vqbet",
    family="vqbet",
    config_type="vqbet",
    description="ResNet-18 keypoints and states through a causal transformer, which draws codes of five-action chunks",
    paper="https://arxiv.org/abs/2403.03181",
    licence="Apache-2.0",
    source="LeRobot 0.6.1 policies/vqbet",
    n_parameters=37_515_530,
    checkpoints=(CheckpointSpec("lerobot/vqbet_pusht", "PushT: one camera, group norm"),),
    vision=ResNetSpec(
        image_size=(96, 96), widths=(64, 128, 256, 512), n_blocks=(2, 2, 2, 2), norm="group", eps=1e-5,
    ),
    keypoints=KeypointSpec(n_keypoints=32, resize=None, crop=(84, 84)),
    expert=CausalSpec(
        d_in=512, d_model=512, d_out=512, n_layers=8, n_heads=8, d_mlp=2048, act="gelu", eps=1e-5, n_positions=500,
    ),
    codes=CodeSpec(
        n_codebooks=2, n_codes=16, d_code=256, d_hidden=128, sequential=False, temperature=0.1, chunk=5, n_ahead=2,
    ),
    features=FeatureSpec(
        cameras=("observation.image",), d_state=2, d_action=2, resize=None, empty_cameras=0, n_action_steps=5,
        max_text=0, pad_text="longest", tokenizer="", n_obs_steps=5,
        normalization={"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
    ),
    # running statistics lose too much in bfloat16, and what is drawn should not depend on rounding
    fp32=("vision", "head"),
    keys={
        "vqbet.rgb_encoder.": {
            "backbone.0.weight": "vision.conv1.weight",
            "backbone.1.weight": "vision.norm1.weight",
            "backbone.1.bias": "vision.norm1.bias",
            "backbone.1.running_mean": "vision.norm1.running_mean",
            "backbone.1.running_var": "vision.norm1.running_var",
            "backbone.1.num_batches_tracked": "vision.norm1.num_batches_tracked",
            # the public layout numbers stages from 4
            "backbone.{+4}.{}.conv1.weight": "vision.stages.{}.{}.conv1.weight",
            "backbone.{+4}.{}.bn1.weight": "vision.stages.{}.{}.norm1.weight",
            "backbone.{+4}.{}.bn1.bias": "vision.stages.{}.{}.norm1.bias",
            "backbone.{+4}.{}.bn1.running_mean": "vision.stages.{}.{}.norm1.running_mean",
            "backbone.{+4}.{}.bn1.running_var": "vision.stages.{}.{}.norm1.running_var",
            "backbone.{+4}.{}.bn1.num_batches_tracked": "vision.stages.{}.{}.norm1.num_batches_tracked",
            "backbone.{+4}.{}.conv2.weight": "vision.stages.{}.{}.conv2.weight",
            "backbone.{+4}.{}.bn2.weight": "vision.stages.{}.{}.norm2.weight",
            "backbone.{+4}.{}.bn2.bias": "vision.stages.{}.{}.norm2.bias",
            "backbone.{+4}.{}.bn2.running_mean": "vision.stages.{}.{}.norm2.running_mean",
            "backbone.{+4}.{}.bn2.running_var": "vision.stages.{}.{}.norm2.running_var",
            "backbone.{+4}.{}.bn2.num_batches_tracked": "vision.stages.{}.{}.norm2.num_batches_tracked",
            "backbone.{+4}.{}.downsample.0.weight": "vision.stages.{}.{}.shortcut_conv.weight",
            "backbone.{+4}.{}.downsample.1.weight": "vision.stages.{}.{}.shortcut_norm.weight",
            "backbone.{+4}.{}.downsample.1.bias": "vision.stages.{}.{}.shortcut_norm.bias",
            "backbone.{+4}.{}.downsample.1.running_mean": "vision.stages.{}.{}.shortcut_norm.running_mean",
            "backbone.{+4}.{}.downsample.1.running_var": "vision.stages.{}.{}.shortcut_norm.running_var",
            "backbone.{+4}.{}.downsample.1.num_batches_tracked": (
                "vision.stages.{}.{}.shortcut_norm.num_batches_tracked"
            ),
            "pool.pos_grid": "vision.pool.pos_grid",
            "pool.nets.weight": "vision.pool.proj.weight",
            "pool.nets.bias": "vision.pool.proj.bias",
            "out.weight": "connector.proj.weight",
            "out.bias": "connector.proj.bias",
        },
        "vqbet.": {
            "action_token": "expert.action_query",
            "select_target_actions_indices": "quantiser.target_indices",
            "state_projector.0.weight": "expert.state_proj.weight",
            "state_projector.0.bias": "expert.state_proj.bias",
            "rgb_feature_projector.0.weight": "expert.image_proj.weight",
            "rgb_feature_projector.0.bias": "expert.image_proj.bias",
            "policy.transformer.wte.weight": "expert.embed.weight",
            "policy.transformer.wte.bias": "expert.embed.bias",
            "policy.transformer.wpe.weight": "expert.pos_embed.weight",
            "policy.transformer.h.{}.ln_1.weight": "expert.blocks.{}.ln1.weight",
            "policy.transformer.h.{}.ln_1.bias": "expert.blocks.{}.ln1.bias",
            "policy.transformer.h.{}.attn.bias": "expert.blocks.{}.attn.mask",
            "policy.transformer.h.{}.attn.c_attn.weight": Split((
                "expert.blocks.{}.attn.q_proj.weight",
                "expert.blocks.{}.attn.k_proj.weight",
                "expert.blocks.{}.attn.v_proj.weight",
            )),
            "policy.transformer.h.{}.attn.c_attn.bias": Split((
                "expert.blocks.{}.attn.q_proj.bias",
                "expert.blocks.{}.attn.k_proj.bias",
                "expert.blocks.{}.attn.v_proj.bias",
            )),
            "policy.transformer.h.{}.attn.c_proj.weight": "expert.blocks.{}.attn.o_proj.weight",
            "policy.transformer.h.{}.attn.c_proj.bias": "expert.blocks.{}.attn.o_proj.bias",
            "policy.transformer.h.{}.ln_2.weight": "expert.blocks.{}.ln2.weight",
            "policy.transformer.h.{}.ln_2.bias": "expert.blocks.{}.ln2.bias",
            "policy.transformer.h.{}.mlp.0.weight": "expert.blocks.{}.mlp.up_proj.weight",
            "policy.transformer.h.{}.mlp.0.bias": "expert.blocks.{}.mlp.up_proj.bias",
            "policy.transformer.h.{}.mlp.2.weight": "expert.blocks.{}.mlp.down_proj.weight",
            "policy.transformer.h.{}.mlp.2.bias": "expert.blocks.{}.mlp.down_proj.bias",
            "policy.transformer.ln_f.weight": "expert.ln_final.weight",
            "policy.transformer.ln_f.bias": "expert.ln_final.bias",
            "policy.lm_head.weight": "expert.out_proj.weight",
        },
        # the quantiser's encoder is for training only
        "vqbet.action_head.": {
            "vqvae_model.discretized": "quantiser.discretized",
            "vqvae_model.vq_layer.freeze_codebook": "quantiser.freeze_codebook",
            "vqvae_model.vq_layer.layers.{}._codebook.initted": "head.codebooks.{}.initted",
            "vqvae_model.vq_layer.layers.{}._codebook.cluster_size": "head.codebooks.{}.cluster_size",
            "vqvae_model.vq_layer.layers.{}._codebook.embed_avg": "head.codebooks.{}.embed_avg",
            "vqvae_model.vq_layer.layers.{}._codebook.embed": "head.codebooks.{}.embed",
            "vqvae_model.encoder.0.weight": "quantiser.layers.0.weight",
            "vqvae_model.encoder.0.bias": "quantiser.layers.0.bias",
            "vqvae_model.encoder.2.weight": "quantiser.layers.1.weight",
            "vqvae_model.encoder.2.bias": "quantiser.layers.1.bias",
            "vqvae_model.encoder.4.weight": "quantiser.layers.2.weight",
            "vqvae_model.encoder.4.bias": "quantiser.layers.2.bias",
            "vqvae_model.decoder.0.weight": "head.decoder.layers.0.linear.weight",
            "vqvae_model.decoder.0.bias": "head.decoder.layers.0.linear.bias",
            "vqvae_model.decoder.2.weight": "head.decoder.layers.1.linear.weight",
            "vqvae_model.decoder.2.bias": "head.decoder.layers.1.linear.bias",
            "vqvae_model.decoder.4.weight": "head.decoder.out.weight",
            "vqvae_model.decoder.4.bias": "head.decoder.out.bias",
            "map_to_cbet_preds_bin.0.weight": "head.logits_proj.weight",
            "map_to_cbet_preds_bin.0.bias": "head.logits_proj.bias",
            # where config.json says sequentially_select
            "map_to_cbet_preds_primary_bin.0.weight": "head.first_proj.weight",
            "map_to_cbet_preds_primary_bin.0.bias": "head.first_proj.bias",
            "map_to_cbet_preds_secondary_bin.0.weight": "head.second_proj.weight",
            "map_to_cbet_preds_secondary_bin.0.bias": "head.second_proj.bias",
            "map_to_cbet_preds_offset.0.weight": "head.offsets_proj.weight",
            "map_to_cbet_preds_offset.0.bias": "head.offsets_proj.bias",
        },
    },
)  # fmt: skip

# the same wiring at a size that runs in milliseconds: for tests, tutorials and the demo, with random weights
TINY = replace(
    SPEC,
    vision=replace(SPEC.vision, image_size=(48, 80), widths=(16, 16, 32, 32), n_blocks=(1, 1, 1, 1)),
    keypoints=KeypointSpec(n_keypoints=4, resize=None, crop=(40, 64)),
    expert=replace(SPEC.expert, d_in=24, d_model=32, d_out=24, n_layers=2, n_heads=4, d_mlp=64, n_positions=32),
    codes=replace(SPEC.codes, n_codes=8, d_code=16, d_hidden=16, chunk=4),
    features=replace(
        SPEC.features, cameras=("agent",), d_state=4, d_action=4, n_action_steps=4, n_obs_steps=3, normalization={}
    ),
)  # fmt: skip
