"""OpenVLA and OFT against recorded values, against a second implementation, and what their wiring implies."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import slow_openvla as slow
import torch
from public_checkpoints import GOLDEN, Golden, read_golden
from tolerance import assert_close
from torch import Tensor

from hooked_vla import HookedVLA, Observation, registry
from hooked_vla.components.ddim import squared_cosine_signal
from hooked_vla.models.openvla_config import with_film
from hooked_vla.spec import LanguageVLASpec
from hooked_vla.weights import KeyRules, plan_loading

_TOWERS = {"featurizer": "dino", "fused_featurizer": "siglip"}
_LEAVES = {"q_proj": "hook_q", "k_proj": "hook_k", "v_proj": "hook_v", "o_proj": "hook_attn_out",
           "down_proj": "hook_mlp_out"}  # fmt: skip


@pytest.fixture(scope="module", params=["openvla", "openvla_oft"])
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def recorded(name: str) -> Golden:
    return read_golden(name)


@pytest.fixture(scope="module")
def model(recorded: Golden) -> HookedVLA:
    return HookedVLA.from_pretrained(recorded.folder)


def tiny(name: str, seed: int = 0, **changes: object) -> HookedVLA:
    """A tiny model with some of its readout's or spec's fields changed, every weight drawn anew: the defaults of
    norms and factors are ones and zeros."""
    spec = registry.get_spec(name, "tiny")
    assert isinstance(spec, LanguageVLASpec)
    readout = {key: value for key, value in changes.items() if key in type(spec.readout).__dataclass_fields__}
    rest = {key: value for key, value in changes.items() if key not in readout}
    spec = replace(spec, readout=replace(spec.readout, **readout), **rest)
    spec = replace(spec, keys=with_film(spec.keys)) if spec.film else spec
    torch.manual_seed(seed)
    net = registry.build_network(spec)
    for key, parameter in net.named_parameters():
        centre = 1.0 if key.endswith(("ln1.weight", "ln2.weight", "ln_final.weight", "ln_in.weight", "scale")) else 0.0
        parameter.data = centre + torch.randn(parameter.shape) / max(25.0, parameter[0].numel()) ** 0.5
    return HookedVLA.from_network(spec, net.eval())


def observation(cameras: tuple[str, ...], batch: int = 2, seed: int = 0, d_state: int = 4) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    images = {c: torch.randint(0, 256, (batch, 40, 48, 3), generator=generator, dtype=torch.uint8) for c in cameras}
    texts = ["Put the RED block away", "lift", "push it"][:batch]
    return Observation(images, torch.randn(batch, d_state, generator=generator), texts)


# What the public implementation recorded.


def test_actions_equal_the_public_implementation(model: HookedVLA, recorded: Golden) -> None:
    actions = model.predict_action_chunk(recorded.batch)
    assert_close(actions.reshape(recorded.actions.shape), recorded.actions)
    assert torch.equal(model.predict_action_chunk(recorded.batch, unnorm_key="libero"), actions)


def test_generated_tokens_equal_the_public_implementation() -> None:
    golden = read_golden("openvla")
    model = HookedVLA.from_pretrained(golden.folder)
    assert torch.equal(model.generate_action_tokens(golden.batch)[0], golden.recorded["output.token_ids"])
    assert torch.equal(model.generate_action_tokens(golden.batch, 3)[0], golden.recorded["output.token_ids"][:3])
    with pytest.raises(ValueError, match="1..7"):
        model.generate_action_tokens(golden.batch, max_new_tokens=8)


def places(module: str) -> list[tuple[str, int | None]] | None:
    """The hook points, with the decode step, that hold what a module of the public implementation returned; None for
    the towers' last blocks, which the public implementation runs although nobody reads them."""
    module, _, call = module.partition("#")
    parts = module.split(".")
    if parts[0] == "projector":
        return [({"fc2": "connector.layers.1.hook_pre", "fc3": "connector.hook_out"}[parts[1]], None)]
    if parts[0] == "vision_backbone":
        block = f"vision.{_TOWERS[parts[1]]}.blocks.{parts[3]}"
        scaled = parts[1] == "featurizer"
        leaf = {"proj": ("hook_attn_out", "ls1"), "fc2": ("hook_mlp_out", "ls2")}[parts[-1]]
        return [(f"{block}.{leaf[1]}.hook_unscaled" if scaled else f"{block}.{leaf[0]}", None)]
    # a forward pass, generation's pass over the prefix, its first step
    start, step = ("decode", 0) if call == "2" else ("vlm", None)
    leaf = _LEAVES[parts[-1]]
    attn = "attn." if leaf in ("hook_q", "hook_k", "hook_v") else ""
    return [(f"{start}.blocks.{parts[3]}.{attn}{leaf}", step)]


@torch.no_grad()
def test_every_recorded_module_agrees_with_its_hook_point(model: HookedVLA, recorded: Golden) -> None:
    _, cache = model.run_with_cache(recorded.batch)
    unread = {f"vision.{name}.blocks.{tower.n_layers - 1}." for name, tower in model.spec.towers.items()}
    compared = 0
    for key, expected in recorded.recorded.items():
        if not key.startswith("ref."):
            continue
        for hook, step in places(key.removeprefix("ref.")):
            if hook.startswith(tuple(unread)):
                # the public implementation runs the towers' last blocks, which nobody reads
                assert hook not in model.points
                continue
            ours = cache[hook] if step is None else cache[hook][step]
            ours = ours.flatten(-2) if ".attn.hook_" in hook else ours
            if hook.startswith("vision"):
                # a row of ours is an image; the recording has a call for each, or the same image in every call
                ours = ours[:, None].expand(expected.shape[0], -1, -1, -1)
            elif hook.startswith("connector"):
                ours = ours.flatten(0, 1).expand(expected.shape)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}")
            compared += 1
    assert compared > 10
    for output, hook in {
        "output.logits_last": "vlm.hook_logits",
        "output.action_hidden_states": "head.hook_in",
    }.items():
        if output in recorded.recorded:
            assert_close(cache[hook].reshape(recorded.recorded[output].shape), recorded.recorded[output])


def test_bfloat16_stays_within_the_table(name: str, recorded: Golden) -> None:
    model = HookedVLA.from_pretrained(recorded.folder, dtype=torch.bfloat16)
    actions = model.predict_action_chunk(recorded.batch)
    assert actions.dtype == torch.float32 and model.net.vlm.embed.weight.dtype == torch.bfloat16
    assert_close(actions.reshape(recorded.actions.shape), recorded.actions, torch.bfloat16)


# Loading.


def public_keys() -> dict[str, tuple[int, ...]]:
    rows = (line.split() for line in (GOLDEN / "keys" / "openvla.txt").read_text().splitlines() if line.strip())
    return {key: tuple(map(int, shape.split("x"))) for key, shape in rows}


@pytest.mark.parametrize("film", [False, True])
def test_published_keys_and_parameters(name: str, film: bool) -> None:
    """Head, state projector and FiLM have the sizes that OFT's public code gives them."""
    spec = registry.get_spec(name)
    with torch.device("meta"):
        net = registry.build_network(replace(spec, film=film))
    assert sum(parameter.numel() for parameter in net.parameters()) == spec.n_parameters + film * 456_241_920
    if name == "openvla" and not film:
        assert spec.n_parameters == 7_541_237_184
        shapes = {key: value.shape for key, value in net.state_dict().items() if not key.startswith("decode.")}
        plan, dropped = plan_loading(KeyRules(spec.keys), public_keys(), shapes)
        assert dropped == [] and len({source.key for source in plan.values()}) == 982


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("openvla", {"d_action": 5}),
        ("openvla_oft", {"d_state": 6, "chunk": 3, "d_action": 2, "bounds": ("min", "max")}),
        ("openvla_oft", {"d_state": 0, "n_layers": 3, "film": True}),
        ("openvla_oft", {"kind": "parallel", "d_hidden": 0, "n_layers": 0}),
        ("openvla_oft", {"kind": "diffuse", "n_steps": 5, "tied": {}}),
    ],
)
def test_other_options_round_trip(name: str, changes: dict[str, object], tmp_path: Path) -> None:
    model = tiny(name, **changes)
    model.save_pretrained(tmp_path)
    again = HookedVLA.from_pretrained(tmp_path)
    assert again.spec.name == name and again.spec.geometry() == model.spec.geometry()
    ours, theirs = model.net.state_dict(), again.net.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    obs, noise = observation(model.spec.features.cameras, d_state=model.spec.readout.d_state), None
    if model.spec.readout.kind == "diffuse":
        noise = torch.randn(2, model.spec.readout.chunk, model.spec.readout.d_action)
    assert torch.equal(again.predict_action_chunk(obs, noise), model.predict_action_chunk(obs, noise))


def copy(golden: Golden, folder: Path) -> Path:
    shutil.copytree(golden.folder, folder)
    return folder


def test_a_public_oft_folder_keeps_its_files(tmp_path: Path) -> None:
    golden = read_golden("openvla_oft")
    model = HookedVLA.from_pretrained(golden.folder)
    model.save_pretrained(tmp_path / "again")
    files = {path.name for path in (tmp_path / "again").glob("*.pt")}
    assert files == {"action_head--100_checkpoint.pt", "proprio_projector--100_checkpoint.pt"}
    for file in files:
        before, after = (torch.load(folder / file, weights_only=True) for folder in (golden.folder, tmp_path / "again"))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(
        HookedVLA.from_pretrained(tmp_path / "again").predict_action_chunk(golden.batch),
        model.predict_action_chunk(golden.batch),
    )


class Payload:
    """Runs code when unpickled."""

    def __reduce__(self):
        return (eval, ("1 / 0",))


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    folder = copy(read_golden("openvla_oft"), tmp_path / "oft")
    head = folder / "action_head--100_checkpoint.pt"
    content = head.read_bytes()
    head.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"action_head--100_checkpoint.pt is truncated"):
        HookedVLA.from_pretrained(folder)
    torch.save({"module.model.fc1.weight": Payload()}, head)
    with pytest.raises(ValueError, match=r"not a file of tensors alone"):
        HookedVLA.from_pretrained(folder)
    torch.save([torch.zeros(2)], head)
    with pytest.raises(ValueError, match=r"tensors by name"):
        HookedVLA.from_pretrained(folder)
    head.write_bytes(content)
    (folder / "action_head--200_checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"two files for 'action_head'.*100.*200"):
        HookedVLA.from_pretrained(folder)
    (folder / "action_head--200_checkpoint.pt").unlink()
    state = torch.load(head, weights_only=True)
    torch.save(state | {"module.model.fc3.weight": torch.zeros(2)}, head)
    with pytest.raises(ValueError, match=r"unexpected key action_head/module.model.fc3.weight"):
        HookedVLA.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_resize_strategy": "letterbox"}, "image_resize_strategy='letterbox' is not supported"),
        ({"timm_override_act_layers": ["quick_gelu", None]}, "quick_gelu"),
        ({"text_config": {"model_type": "mistral"}}, "model_type='mistral' is not supported"),
        ({"text_config": {"rope_scaling": {"type": "linear"}}}, "rope_scaling"),
    ],
)
def test_unsupported_options_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = copy(read_golden("openvla"), tmp_path / "openvla")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        HookedVLA.from_pretrained(folder)


def test_an_unknown_chunk_length_is_asked_for(tmp_path: Path) -> None:
    model = tiny("openvla_oft", d_action=3, chunk=5)
    model.save_pretrained(tmp_path)
    geometry = json.loads((tmp_path / "geometry.json").read_text())
    assert HookedVLA.from_pretrained(tmp_path).spec.readout.chunk == 5
    geometry["readout"]["kind"] = "generate"
    (tmp_path / "geometry.json").write_text(json.dumps(geometry))
    assert HookedVLA.from_pretrained(tmp_path).spec.readout.kind == "regress"
    head = tmp_path / "action_head--latest_checkpoint.pt"
    head.rename(tmp_path / "action_head.away")
    with pytest.raises(ValueError, match="readout kind 'generate' does not go with the files"):
        HookedVLA.from_pretrained(tmp_path)
    (tmp_path / "action_head.away").rename(head)
    del geometry["readout"]["chunk"]
    (tmp_path / "geometry.json").write_text(json.dumps(geometry))
    with pytest.raises(ValueError, match="3 action dimensions.*chunk"):
        HookedVLA.from_pretrained(tmp_path)


# The second implementation.


def slow_sequence(
    model: HookedVLA, w: slow.Weights, inputs, row: int, own: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """[first prompt token, images, own tokens, rest of the prompt], and the table of embeddings."""
    spec = model.spec
    ids = inputs.tokens[row][inputs.token_mask[row]]
    embed = w["language_model.model.embed_tokens.weight"]
    prompt, described = embed[ids], torch.cat([embed[ids], embed[spec.prompt.stop][None]])
    heads = dict(zip(("featurizer", "fused_featurizer"), (t.n_heads for t in spec.towers.values()), strict=False))
    seen = [
        slow.image_tokens(w, image, heads, described.mean(0) if spec.film else None) for image in inputs.images[row]
    ]
    return [prompt[:1], *seen, *own, prompt[1:]], embed


def slow_hidden(model: HookedVLA, w: slow.Weights, sequence: Tensor) -> Tensor:
    vlm, causal = model.spec.vlm, model.spec.readout.kind == "generate"
    return slow.llama(w, sequence, vlm.n_heads, vlm.eps, vlm.rope_base, causal)


def slow_read(model: HookedVLA, w: slow.Weights, inputs, row: int, own: list[Tensor], actions: Tensor) -> Tensor:
    """OFT: hidden states of the last prompt token and all action tokens but the last."""
    parts, embed = slow_sequence(model, w, inputs, row, own)
    hidden = slow_hidden(model, w, torch.cat([*parts, actions, embed[model.spec.prompt.stop][None]]))
    return hidden[-len(actions) - 2 : -2]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"d_state": 0, "chunk": 2, "d_action": 3},
        {"film": True, "n_layers": 1},
        {"vlm": {"n_kv_heads": 2, "eps": 1e-3, "rope_base": 50.0}},
    ],
)
@torch.no_grad()
def test_regression_equals_the_slow_implementation(changes: dict) -> None:
    spec = registry.get_spec("openvla_oft", "tiny")
    if "vlm" in changes:
        changes = {"vlm": replace(spec.vlm, **changes["vlm"])}
    model = tiny("openvla_oft", **changes)
    w, readout = model.public_state_dict(), model.spec.readout
    inputs = model.prepare(observation(("agent", "wrist"), d_state=readout.d_state))
    actions = model.sample_actions(inputs)
    for row in range(2):
        own = [slow.projector(w, "proprio_projector", inputs.state[row])[None]] if readout.d_state else []
        zeros = torch.zeros(readout.chunk * readout.d_action, model.spec.vlm.d_model)
        hidden = slow_read(model, w, inputs, row, own, zeros).reshape(readout.chunk, -1)
        assert_close(actions[row], slow.resnet(w, "action_head/module.model", hidden))


@torch.no_grad()
def test_parallel_tokens_equal_the_slow_implementation() -> None:
    model = tiny("openvla_oft", kind="parallel", d_hidden=0, n_layers=0, d_state=0)
    w, readout = model.public_state_dict(), model.spec.readout
    inputs = model.prepare(observation(("agent", "wrist")))
    actions, cache = model.run_with_cache(inputs, "vlm.hook_logits")
    n_ids = model.spec.vlm.d_vocab - readout.n_padding_ids
    for row in range(2):
        zeros = torch.zeros(readout.chunk * readout.d_action, model.spec.vlm.d_model)
        logits = slow.linear(w, "language_model.lm_head", slow_read(model, w, inputs, row, [], zeros))
        assert_close(cache["vlm.hook_logits"][row], logits)
        bins = (n_ids - logits.argmax(-1) - 1).clamp(0, readout.n_bins - 2)
        expected = -1 + (bins + 0.5) * 2 / (readout.n_bins - 1)
        assert_close(actions.chunk[row].flatten(), expected)


@torch.no_grad()
def test_generation_equals_the_slow_implementation() -> None:
    model = tiny("openvla", d_action=4)
    w, inputs = model.public_state_dict(), model.prepare(observation(("agent",)))
    tokens = model.generate_action_tokens(inputs)
    assert len(tokens.unique()) > 2
    for row in range(2):
        parts, embed = slow_sequence(model, w, inputs, row, [])
        said: list[int] = []
        for _ in range(4):
            hidden = slow_hidden(model, w, torch.cat([*parts, embed[said]]))
            said.append(int(slow.linear(w, "language_model.lm_head", hidden[-1]).argmax()))
        assert said == tokens[row].tolist()


@torch.no_grad()
def test_one_tower_equals_the_slow_implementation(tmp_path: Path) -> None:
    """OpenVLA v0.1: SigLIP alone, in the first tower's place, a connector with one hidden layer, Vicuna's prompt."""
    model = tiny("openvla")
    w = {key: value for key, value in model.public_state_dict().items() if ".featurizer." not in key}
    w = {key.replace("fused_featurizer", "featurizer"): value for key, value in w.items() if "fc3" not in key}
    d_vision, d_model = model.spec.towers["siglip"].d_model, model.spec.vlm.d_model
    w["projector.fc1.weight"], w["projector.fc1.bias"] = torch.randn(d_model, d_vision), torch.randn(d_model)
    w["projector.fc2.weight"], w["projector.fc2.bias"] = torch.randn(d_model, d_model) / 8, torch.randn(d_model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"use_fused_vision_backbone": False, "llm_backbone_id": "vicuna-v15-7b"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    geometry = json.loads((tmp_path / "geometry.json").read_text())
    (tmp_path / "geometry.json").write_text(json.dumps({k: v for k, v in geometry.items() if k != "prompt"}))
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in w.items()}, tmp_path / "model.safetensors")
    single = HookedVLA.from_pretrained(tmp_path)
    assert single.spec.prompt.template.startswith("A chat between") and "vision.hook_concat" not in single.points
    assert list(single.spec.towers) == ["siglip"]
    batch = {"input_ids": torch.tensor([[1, 5, 6, 300]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    single.spec = replace(single.spec, prompt=replace(single.spec.prompt, end=300))
    single.processor.spec = single.spec
    inputs = single.prepare(batch)
    logits = single.net.token_logits(inputs)
    parts, _ = slow_sequence(single, w, inputs, 0, [])
    hidden = slow_hidden(single, w, torch.cat(parts))
    assert_close(logits[0, 0], slow.linear(w, "language_model.lm_head", hidden[-1]))
    single.save_pretrained(tmp_path / "again")
    again = HookedVLA.from_pretrained(tmp_path / "again")
    assert torch.equal(again.predict_action_chunk(inputs), single.predict_action_chunk(inputs))


@torch.no_grad()
def test_diffusion_equals_the_slow_implementation() -> None:
    n_steps = 4
    model = tiny("openvla_oft", kind="diffuse", n_steps=n_steps, tied={}, chunk=3, d_action=2)
    w, d_model = model.public_state_dict(), model.spec.vlm.d_model
    inputs = model.prepare(observation(("agent", "wrist")))
    noise = torch.randn(2, 3, 2)
    actions, cache = model.run_with_cache(inputs, ["expert.hook_noisy_actions", "expert.hook_noise"], noise=noise)
    assert cache["expert.hook_noise"].shape == (n_steps, 2, 3, 2)
    signal = squared_cosine_signal(n_steps)
    for row in range(2):
        state, x = slow.projector(w, "proprio_projector", inputs.state[row])[None], noise[row]
        for t in reversed(range(n_steps)):
            angle = t * 10_000 ** (-torch.arange(d_model // 2) / (d_model // 2 - 1))
            time = torch.cat([angle.sin(), angle.cos()])[None]
            tokens = slow.projector(w, "noisy_action_projector", x.reshape(-1, 1))
            hidden = slow_read(model, w, inputs, row, [state, time], tokens).reshape(3, -1)
            predicted = slow.resnet(w, "action_head/module.noise_predictor.mlp_resnet", hidden)
            clean = ((x - (1 - signal[t]) ** 0.5 * predicted) / signal[t] ** 0.5).clamp(-1, 1)
            before = signal[t - 1] if t else 1.0
            x = before**0.5 * clean + (1 - before) ** 0.5 * predicted
        assert_close(actions.chunk[row], x)


@torch.no_grad()
def test_low_rank_updates_beside_film_towers_are_added(tmp_path: Path) -> None:
    """OFT trains with PEFT and saves FiLM's towers before the updates are merged: alpha is min(rank, 16)."""
    model = tiny("openvla_oft", film=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "vision_backbone--latest_checkpoint.pt"
    stored = torch.load(file, weights_only=True)
    key = "vision_backbone.featurizer.blocks.0.block.mlp.fc1"
    a, b = torch.randn(20, stored[f"{key}.weight"].shape[1]), torch.randn(stored[f"{key}.weight"].shape[0], 20)
    expected = stored[f"{key}.weight"] + 16 / 20 * b @ a
    for kind in ("weight", "bias"):
        stored[f"{key}.base_layer.{kind}"] = stored.pop(f"{key}.{kind}")
    stored |= {f"{key}.lora_A.default.weight": a, f"{key}.lora_B.default.weight": b}
    torch.save(stored, file)
    again = HookedVLA.from_pretrained(tmp_path)
    assert_close(again.net.vision.dino.blocks[0].mlp.up_proj.weight, expected)


# Properties.


@torch.no_grad()
def test_generation_with_a_cache_equals_reading_the_answer_in_one_pass() -> None:
    model = tiny("openvla", d_action=5)
    inputs = model.prepare(observation(("agent",)))
    _, cache = model.run_with_cache(inputs, "*.hook_logits")
    tokens = model.generate_action_tokens(inputs)
    one_by_one = torch.stack([cache["vlm.hook_logits"], *cache["decode.hook_logits"]], dim=1)
    forced = replace(inputs, action_tokens=tokens)
    assert_close(model.net.token_logits(forced), one_by_one)
    assert torch.equal(model.generate_action_tokens(forced), tokens)
    assert torch.equal(model.predict_action_chunk(forced), model.predict_action_chunk(inputs))
    batch = {"input_ids": torch.tensor([[1, 7, 300]]), "pixel_values": torch.randn(1, 6, 32, 32)}
    said = model.generate_action_tokens(batch)
    _, seen = model.run_with_cache(batch | {"action_tokens": said}, "vlm.hook_tokens")
    assert seen["vlm.hook_tokens"].segment("action").shape[1] == 4


@pytest.mark.parametrize("changes", [{}, {"kind": "diffuse", "n_steps": 3, "tied": {}}, {"film": True}])
@torch.no_grad()
def test_rows_are_independent_and_padding_changes_nothing(changes: dict) -> None:
    for name in ["openvla", "openvla_oft"] if not changes else ["openvla_oft"]:
        model = tiny(name, **changes)
        inputs = model.prepare(observation(model.spec.features.cameras, batch=3))
        assert not inputs.token_mask.all()
        readout = model.spec.readout
        noise = torch.randn(3, readout.chunk, readout.d_action) if readout.kind == "diffuse" else None
        both = model.sample_actions(inputs, noise)
        scrambled = replace(inputs, tokens=torch.where(inputs.token_mask, inputs.tokens, 9))
        assert torch.equal(model.sample_actions(scrambled, noise), both)
        for row in range(3):
            alone = inputs.rows([row])
            n = int(alone.token_mask.sum())
            alone = replace(alone, tokens=alone.tokens[:, :n], token_mask=alone.token_mask[:, :n])
            assert_close(
                model.sample_actions(alone, None if noise is None else noise[row : row + 1]), both[row : row + 1]
            )


@torch.no_grad()
def test_a_hidden_camera_does_not_reach_the_actions() -> None:
    model = tiny("openvla_oft")
    first, second = observation(("agent", "wrist"), seed=0), observation(("agent", "wrist"), seed=1)
    hidden = {"wrist": torch.zeros(2, dtype=torch.bool)}
    a = replace(first, image_masks=hidden)
    b = replace(a, images={"agent": first.images["agent"], "wrist": second.images["wrist"]})
    assert torch.equal(model.predict_action_chunk(a), model.predict_action_chunk(b))
    assert not torch.equal(model.predict_action_chunk(a), model.predict_action_chunk(replace(b, image_masks=None)))


@torch.no_grad()
def test_only_openvla_is_causal(model: HookedVLA, recorded: Golden, name: str) -> None:
    _, cache = model.run_with_cache(recorded.batch, "vlm.blocks.0.attn.hook_pattern")
    pattern = cache["vlm.blocks.0.attn.hook_pattern"]
    assert bool((pattern.triu(1) == 0).all()) == (name == "openvla")
    assert name == "openvla" or bool((pattern > 0).all())


@torch.no_grad()
def test_patching_the_residual_stream_of_a_layer_reproduces_the_source() -> None:
    model = tiny("openvla_oft")
    a, b = (model.prepare(observation(("agent", "wrist"), seed=seed)) for seed in (0, 1))
    site = "vlm.blocks.1.hook_resid_pre"
    expected, cache = model.run_with_cache(b, site)
    patched = model.run_with_hooks(a, [(site, lambda value, hook: cache[site])])
    assert torch.equal(patched.chunk, expected.chunk) and not torch.equal(model(a).chunk, expected.chunk)


@torch.no_grad()
def test_film_between_the_halves_of_a_block() -> None:
    model = tiny("openvla_oft", film=True)
    _, cache = model.run_with_cache(observation(("agent", "wrist")), "vision.*")
    for tower in ("dino", "siglip"):
        block = f"vision.{tower}.blocks.1"
        gamma, beta = (cache[f"{block}.film.hook_{part}"][:, None] for part in ("gamma", "beta"))
        assert torch.equal(cache[f"{block}.hook_resid_mid"] * (1 + gamma) + beta, cache[f"{block}.film.hook_out"])
        total = cache[f"{block}.film.hook_out"] + cache[f"{block}.hook_mlp_out"]
        assert torch.equal(total, cache[f"{block}.hook_resid_post"])


@pytest.mark.parametrize(
    "changes", [{"film": True}, {"kind": "diffuse", "n_steps": 3, "tied": {}}, {"kind": "parallel"}]
)
@torch.no_grad()
def test_every_point_of_every_option_fires_as_declared(changes: dict) -> None:
    model = tiny("openvla_oft", **changes)
    inputs = model.prepare(observation(("agent", "wrist")))
    _, cache = model.run_with_cache(inputs)
    assert set(cache.aliases) | set(cache) == set(model.points) and model.cache_size(inputs) == cache.nbytes
    for name, site in model.hook_points.items():
        assert site.meaning and cache[name].dtype == site.dtype
        shape = cache[name].shape[1:] if site.denoised else cache[name].shape
        declared = [size if isinstance(size, int) else actual for size, actual in zip(site.shape, shape, strict=True)]
        assert list(shape) == declared, name


def test_segments_of_both(name: str) -> None:
    model = tiny(name)
    inputs = model.prepare(observation(model.spec.features.cameras))
    segments = model.segments(inputs)
    oft = name == "openvla_oft"
    images = [f"image:{camera}" for camera in model.spec.features.cameras]
    expected = ["special", *images, *["state"] * oft, "language", *["action"] * oft, "pad"]
    assert sorted(segments["vlm"].present()) == sorted(expected)
    assert segments["vlm"].mask(images[0]).sum(1).tolist() == [16, 16]
    assert segments["vision.dino"].mask("special").sum(1).tolist() == [3] * 2 * len(images)
    assert segments["vision"].labels.shape == (2 * len(images), 16)


# Inputs and statistics.


def stats(low: float, high: float, width: int = 7, **more: object) -> dict[str, object]:
    action = {"q01": [low] * width, "q99": [high] * width, "min": [-9.0] * width, "max": [9.0] * width}
    return {"action": action, "proprio": {}, **more}


def with_statistics(folder: Path, statistics: dict[str, object]) -> HookedVLA:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_stats": statistics}))
    return HookedVLA.from_pretrained(folder)


def test_unnorm_key_chooses_the_statistics(tmp_path: Path) -> None:
    golden = read_golden("openvla")
    folder = copy(golden, tmp_path / "openvla")
    model = with_statistics(folder, {"bridge": stats(-1.0, 1.0), "kuka": stats(0.0, 2.0)})
    a, b = (model(golden.batch, unnorm_key=key) for key in ("bridge", "kuka"))
    assert_close(a.chunk, a.normalized)
    assert_close(b.chunk, a.normalized + 1)
    model.select_action(golden.batch, unnorm_key="kuka")
    _, cache = model.run_with_cache(golden.batch, "vlm.hook_tokens", unnorm_key="kuka")
    with pytest.raises(ValueError, match=r"several datasets: pass unnorm_key=, one of \['bridge', 'kuka'\]"):
        model.predict_action_chunk(golden.batch)
    with pytest.raises(ValueError, match=r"unknown unnorm_key 'aloha'; known: \['bridge', 'kuka'\]"):
        model.predict_action_chunk(golden.batch, unnorm_key="aloha")
    with pytest.raises(ValueError, match="leave the key out"):
        HookedVLA.from_spec("smolvla", "tiny").predict_action_chunk({}, unnorm_key="x")
    (folder / "dataset_statistics.json").write_text(json.dumps({"own": stats(0.0, 4.0)}))
    assert_close(HookedVLA.from_pretrained(folder).predict_action_chunk(golden.batch), 2 * a.normalized + 2)


def test_raw_observations_are_preprocessed_as_the_public_processor_does() -> None:
    model = tiny("openvla_oft")
    obs = observation(("agent", "wrist"))
    known = {"own": stats(-1.0, 3.0, 4, proprio={"q01": [-2.0] * 4, "q99": [2.0, 2.0, 2.0, -2.0]})}
    model.processor.normalizer = replace(model.processor.normalizer, datasets=known)
    inputs, raw = model.prepare_raw(obs)
    assert raw and inputs.images.shape == (2, 2, 6, 32, 32)
    text = "In: What action should the robot take to lift?\nOut:"
    ids = inputs.tokens[1][inputs.token_mask[1]].tolist()
    assert ids[0] == 1 and ids[-1] == 300 and len(ids) == len(text) + 2
    state = obs.state / 2
    assert_close(inputs.state[:, :3], state[:, :3].clamp(-1, 1))
    levels = (inputs.images[0, 0, 3:] * 0.5 + 0.5) * 255
    assert_close(levels, levels.round(), torch.bfloat16)
    dino = inputs.images[0, 0, :3] * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert_close(dino + torch.tensor([0.485, 0.456, 0.406])[:, None, None], levels / 255)
    chunk, normalized = model(obs).chunk, model(obs).normalized
    assert_close(chunk, 2 * (normalized + 1) - 1)
    empty = tiny("openvla")
    assert empty(Observation(observation(("agent",)).images, None, "lift")).chunk.shape == (2, 1, 4)


def test_the_prompt_ends_as_in_training(model: HookedVLA, recorded: Golden) -> None:
    """A prompt without its last token gets it, whether or not the mask was made longer."""
    batch, ids = recorded.batch, recorded.batch["input_ids"]
    assert ids[0, -1] == 29871
    short = batch | {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
    longer = batch | {"attention_mask": torch.ones_like(ids[:, :-1])}
    left = batch | {
        "input_ids": torch.cat([torch.zeros_like(ids[:, :3]), ids], dim=1),
        "attention_mask": torch.cat([torch.zeros_like(ids[:, :3]), torch.ones_like(ids)], dim=1),
    }
    expected = model.predict_action_chunk(batch)
    for other in (short, longer, left):
        assert torch.equal(model.predict_action_chunk(other), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pixel_values": torch.zeros(1, 5, 56, 56)}, ValueError, r"'pixel_values' must be \[batch, 6 for each image"),
        ({"pixel_values": torch.full((1, 6, 56, 56), torch.nan)}, ValueError, "'pixel_values' has NaN"),
        ({"pixel_values": torch.zeros(1, 12, 56, 56)}, ValueError, "2 images, but the model reads"),
        ({"input_ids": torch.tensor([[1, 40000]])}, ValueError, r"ids in 0..32063"),
        ({"input_ids": torch.ones(1, 3)}, ValueError, "'input_ids' must be integers"),
        ({"attention_mask": torch.ones(1, 3)}, ValueError, "'attention_mask' must be"),
        ({"action_tokens": torch.zeros(1, 3, dtype=torch.long)}, ValueError, r"'action_tokens' must be ids \[1, 7\]"),
    ],
)
def test_bad_batches_say_what_is_wrong(change: dict, error: type[Exception], message: str) -> None:
    golden = read_golden("openvla")
    model = HookedVLA.from_pretrained(golden.folder)
    with pytest.raises(error, match=message):
        model.predict_action_chunk(golden.batch | change)


def test_bad_observations_say_what_is_wrong() -> None:
    model = tiny("openvla_oft")
    obs = observation(("agent", "wrist"))
    with pytest.raises(KeyError, match="missing cameras.*wrist"):
        model(replace(obs, images={"agent": obs.images["agent"]}))
    with pytest.raises(ValueError, match=r"must be \[2, 4\]"):
        model(replace(obs, state=torch.zeros(2, 5)))
    with pytest.raises(ValueError, match="prompt of"):
        model(replace(obs, instruction="x" * 200))
    with pytest.raises(TypeError, match="does not generate tokens"):
        model.generate_action_tokens(obs)


@torch.no_grad()
def test_each_tower_has_a_residual_stream_of_its_own(recorded: Golden, model: HookedVLA) -> None:
    _, cache = model.run_with_cache(recorded.batch, "vision.*")
    for tower, sizes in model.spec.towers.items():
        last = cache[f"vision.{tower}.blocks.{sizes.n_layers - 2}.hook_resid_post"]
        parts, labels = cache.decompose_resid(f"vision.{tower}")
        assert len(labels) == 1 + 2 * (sizes.n_layers - 1)
        assert_close(parts.sum(0), last)
        assert torch.equal(cache.accumulated_resid(f"vision.{tower}")[-1], last)
    features = cache["vision.hook_concat"]
    assert torch.equal(
        features[..., : model.spec.towers["dino"].d_model], cache["vision.dino.blocks.2.hook_resid_post"][:, 5:]
    )


def test_parts_of_the_model_on_disk(recorded: Golden, model: HookedVLA, tmp_path: Path) -> None:
    # `decode` shares the weights of `vlm`, and is where they are
    places = {way: "disk" if way in ("vision", "vlm", "decode") else "cpu" for way, _ in model.net.named_children()}
    split = HookedVLA.from_pretrained(recorded.folder, device_map=places, offload_dir=tmp_path)
    assert torch.equal(split.predict_action_chunk(recorded.batch), model.predict_action_chunk(recorded.batch))


def test_channel_statistics_come_from_the_checkpoint(tmp_path: Path) -> None:
    model = tiny("openvla")
    model.save_pretrained(tmp_path)
    means, stds = [[0.5, 0.25, 0.0], [0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0], [0.5, 0.5, 0.5]]
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"means": means, "stds": stds, "interpolations": ["bicubic"] * 2}))
    again = HookedVLA.from_pretrained(tmp_path)
    images = again.prepare(observation(("agent",))).images[:, 0]
    levels = images[:, 3:] / 2
    assert_close(images[:, :3] + torch.tensor(means[0])[:, None, None], levels)
    assert_close(levels * 255, (levels * 255).round(), torch.bfloat16)
    file.write_text(json.dumps({"interpolations": ["bilinear"] * 2}))
    with pytest.raises(ValueError, match="interpolations=.*bilinear.*not supported"):
        HookedVLA.from_pretrained(tmp_path)
