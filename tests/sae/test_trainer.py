"""Training: every architecture and preset learns, runs do not disturb each other, mistakes are named."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_saes import MIXING, SITE, D, settings, source, tokens
from unchecked import unchecked_shapes

from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.config import SAEConfig
from hooked_vla.sae.evaluate import evaluate
from hooked_vla.sae.presets import nested_prefixes, preset
from hooked_vla.sae.source import TensorSource
from hooked_vla.sae.trainer import train


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CASES = {
    "relu": settings("relu", penalty=0.02),
    "topk": settings("topk"),
    "batch_topk": settings("batch_topk"),
    "jumprelu": settings("jumprelu", penalty=0.02, bandwidth=0.2, threshold=0.1),
    "gated": settings("gated", penalty=0.02),
    "matryoshka": settings("matryoshka", prefixes=nested_prefixes(64)),
    "transcoder": settings("transcoder", output_site="other", d_output=12, subtract_decoder_bias=False),
    "temporal": settings("temporal", contrast=0.01),
}


PRESETS = {
    name: preset(name, "model", SITE, D, steps=90, batch_size=64, rate=5e-3, k=4)
    for name in ("hooked", "atlas", "atlas-temporal", "drvla", "event")
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SparseAutoencoder]]:
    """All cases and presets on one pass, in which each is what it would be alone (tested below); without runtime shape
    checks, which the other tests have."""
    configs, folder = {**CASES, **PRESETS}, tmp_path_factory.mktemp("trained")
    with unchecked_shapes():
        made = train(source(), list(configs.values()), folder, progress=False)
    yield dict(zip(configs, made, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_architecture_learns_to_reconstruct(name: str, trained: dict[str, SparseAutoencoder]) -> None:
    """Held-out tokens are explained far better than before training, by few features."""
    config = CASES[name]
    held_out = {SITE: tokens(512, seed=9), "other": tokens(512, seed=9) @ MIXING}
    rows = source().sample(500)
    untrained = SparseAutoencoder(config).eval()
    untrained.start(rows[SITE], rows["other"] if name == "transcoder" else None)
    sae = trained[name]
    before, after = evaluate(untrained, held_out), evaluate(sae, held_out)
    assert after.fvu < 0.5 and after.fvu < 0.6 * before.fvu
    # by a third of all features at most
    assert after.l0 < 64 / 3
    # rows of the decoder keep their length
    torch.testing.assert_close(sae.w_dec.norm(dim=1), torch.ones(64), rtol=1e-5, atol=1e-5)


def test_several_autoencoders_train_on_one_pass_as_they_would_alone(tmp_path: Path) -> None:
    configs = [settings("topk", steps=8), settings("relu", steps=8, penalty=0.1, clip=0.5)]
    together = train(source(), configs, tmp_path / "both", progress=False)
    for i, config in enumerate(configs):
        [alone] = train(source(), [config], tmp_path / str(i), progress=False)
        for name, value in alone.state_dict().items():
            assert torch.equal(value, together[i].state_dict()[name]), name
    assert {path.name for path in (tmp_path / "both").iterdir()} >= {f"{SITE}-0", f"{SITE}-1"}


def test_one_pass_over_the_source_feeds_all(tmp_path: Path) -> None:
    made, asked = source(), []

    def batches(n: int) -> Iterator[dict[str, Tensor]]:
        for rows in TensorSource.batches(made, n):
            asked.append(n)
            yield rows

    made.batches = batches  # pyright: ignore[reportAttributeAccessIssue]
    train(made, [settings("topk", steps=4), settings("relu", steps=4, penalty=0.1)], tmp_path, progress=False)
    assert asked == [64] * 4


def test_a_finished_run_is_returned_as_it_is(tmp_path: Path) -> None:
    config = settings("topk", steps=3)
    [made] = train(source(), [config], tmp_path, progress=False)
    before = files(tmp_path)
    exhausted = TensorSource(source().tensors, passes=1)
    [again] = train(exhausted, [config], tmp_path, progress=False)
    assert torch.equal(made.w_enc, again.w_enc) and files(tmp_path) == before
    assert not list(tmp_path.glob("*state-*"))


def bad(tensor: Tensor) -> Tensor:
    spoiled = tensor.clone()
    spoiled[7, 3] = torch.nan
    return spoiled


def test_mistakes_are_named(tmp_path: Path) -> None:
    rows = source().tensors
    with pytest.raises(ValueError, match=r"no expert\.blocks\.9.*it has \['expert\.blocks\.1"):
        train(source(), [settings("topk", site="expert.blocks.9")], tmp_path, progress=False)
    with pytest.raises(ValueError, match="24 wide, the config says 32"):
        train(source(), [settings("topk", d_model=32)], tmp_path, progress=False)
    with pytest.raises(ValueError, match="same steps and batch_size"):
        train(source(), [settings("topk"), settings("topk", steps=7)], tmp_path, progress=False)
    with pytest.raises(ValueError, match="empty"):
        train(source(), [], tmp_path, progress=False)
    with pytest.raises(ValueError, match="has no .*@previous"):
        train(TensorSource({SITE: rows[SITE]}), [settings("temporal")], tmp_path, progress=False)
    constant = TensorSource({SITE: torch.ones(200, D)})
    with pytest.raises(ValueError, match=f"{SITE}: activations are constant over 200 rows"):
        train(constant, [settings("topk")], tmp_path / "constant", progress=False)
    with pytest.raises(ValueError, match="ended after 3 of 90 batches of 64 and 8 rows"):
        train(TensorSource({SITE: rows[SITE][:200]}, passes=1), [settings("topk")], tmp_path / "short", progress=False)


def test_a_nan_in_a_batch_is_named_and_loses_nothing(tmp_path: Path) -> None:
    made, config = source(), settings("topk", steps=20)

    def batches(n: int) -> Iterator[dict[str, Tensor]]:
        for number, rows in enumerate(TensorSource.batches(made, n)):
            yield rows if number != 13 else {site: bad(each) for site, each in rows.items()}

    made.batches = batches  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=f"batch 14: {SITE}.*row 7, channel 3: nan"):
        train(made, [config], tmp_path / "run", save_every=5, log_every=5, progress=False)
    [resumed] = train(source(), [config], tmp_path / "run", save_every=5, log_every=5, progress=False)
    [whole] = train(source(), [config], tmp_path / "whole", save_every=5, log_every=5, progress=False)
    assert torch.equal(resumed.w_enc, whole.w_enc)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    train(source(), [settings("topk", steps=2)], tmp_path, progress=False)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"other settings: saes\[0\]\.k: 4, now 5"):
        train(source(), [settings("topk", steps=2, k=5)], tmp_path, progress=False)
    assert files(tmp_path) == before


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    made, config = source(), settings("topk", steps=2)

    def batches(n: int) -> Iterator[dict[str, Tensor]]:
        with pytest.raises(BlockingIOError, match="another process is training"):
            train(source(), [config], tmp_path, progress=False)
        yield from TensorSource.batches(made, n)

    made.batches = batches  # pyright: ignore[reportAttributeAccessIssue]
    train(made, [config], tmp_path, progress=False)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_train(name: str, trained: dict[str, SparseAutoencoder]) -> None:
    assert isinstance(PRESETS[name], SAEConfig) and trained[name].config == PRESETS[name]
    assert evaluate(trained[name], tokens(512, seed=9)).fvu < 0.5
