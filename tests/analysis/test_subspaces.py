"""Subspaces: what is found is what was planted, bases nest, files come back, edits do what the subspace says."""

from pathlib import Path

import numpy as np
import pytest
import torch
from public_checkpoints import make_observation
from tolerance import assert_close

from hooked_vla import HookedVLA
from hooked_vla.analysis.probes import fit_probe
from hooked_vla.analysis.subspaces import (
    Subspace,
    from_directions,
    from_probes,
    lda,
    load_subspaces,
    mean_difference,
    paired_pca,
    pca,
    random_subspace,
    save_subspaces,
    smallest_k,
)

D = 10
PLANTED = torch.linalg.qr(torch.randn(D, 2, generator=torch.Generator().manual_seed(5)))[0].T.double()
SITE = "vlm.blocks.0.hook_resid_post"


def noise(n: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted() -> Subspace:
    return Subspace(PLANTED, torch.zeros(D), "planted")


def test_pca_finds_the_directions_of_largest_spread() -> None:
    x = noise(400, 0, 0.1) + noise(400, 1)[:, :2] @ (PLANTED * torch.tensor([[3.0], [1.0]])) + 7
    found = pca(x, 4, SITE)
    assert found.first(2).overlap(planted()) > 0.99
    assert abs(float(found.basis[0] @ PLANTED[0])) > 0.99
    assert torch.allclose(found.center, x.mean(0))
    assert found.share(x) > found.first(2).share(x) > 0.98 > found.first(1).share(x) > 0.8
    # what groups have in common is spread too, until it is taken away
    groups = [i % 2 for i in range(400)]
    far = x + 50 * torch.eye(D, dtype=torch.float64)[3] * torch.tensor(groups)[:, None]
    assert abs(float(pca(far, 1).basis[0, 3])) > 0.99
    assert pca(far, 2, within=groups).overlap(planted()) > 0.99


def test_pairs_show_what_differs_in_them() -> None:
    scene = noise(300, 2, 5.0)
    other = scene + noise(300, 3)[:, :2] @ PLANTED
    assert paired_pca(scene, other, 2).overlap(planted()) > 0.999
    assert pca(torch.cat([scene, other]), 2).overlap(planted()) < 0.9


def test_class_means_and_discriminants() -> None:
    labels = [("a", "b", "c")[i % 3] for i in range(600)]
    corners = torch.tensor([[0.0, 0], [2, 0], [0, 1]], dtype=torch.float64) @ PLANTED
    x = noise(600, 4, 0.3) + corners[[("a", "b", "c").index(each) for each in labels]]
    for find in (mean_difference, lda):
        found = find(x, labels, site=SITE)
        assert found.k == 2 and found.overlap(planted()) > 0.97
    two = mean_difference(x[:2], ["a", "b"])
    assert two.k == 1 and abs(float(two.basis[0] @ (x[1] - x[0]) / (x[1] - x[0]).norm())) > 1 - 1e-9
    # discriminants turn away from directions in which classes spread: they read, and are not where classes differ
    spread = torch.eye(D, dtype=torch.float64)[0] * noise(600, 5, 4.0)[:, :1]
    halves = [i % 2 for i in range(600)]
    shift = torch.zeros(D, dtype=torch.float64)
    shift[:2] = 1
    y = noise(600, 6, 0.2) + spread + shift * torch.tensor(halves)[:, None]
    assert abs(float(lda(y, halves).basis[0, 1])) > 0.95
    assert float(mean_difference(y, halves).basis[0, :2].norm()) > 0.95


def test_means_within_groups_are_compared_inside_them() -> None:
    """Classes differ along another direction at every place; their means over places are the same."""
    place, label = [i % 2 for i in range(400)], [(i // 2) % 2 for i in range(400)]
    signs = torch.tensor([1.0 if a == b else -1.0 for a, b in zip(place, label, strict=True)], dtype=torch.float64)
    x = noise(400, 7, 0.1) + signs[:, None] * PLANTED[0]
    assert abs(float(mean_difference(x, label, within=place).basis[0] @ PLANTED[0])) > 0.99


def test_probes_span_what_they_read() -> None:
    x = noise(500, 8)
    probes = [fit_probe(x, (x @ row).numpy(), "ridge") for row in PLANTED]
    assert from_probes(probes, SITE).overlap(planted()) > 0.999
    side = np.where((x @ PLANTED[0]).numpy() > 0, "right", "left")
    assert from_probes(fit_probe(x, side, "logistic")).k == 1


def test_random_subspaces_are_seeded_orthonormal_and_no_place_in_particular() -> None:
    one = random_subspace(D, 4, seed=1)
    assert torch.equal(one.basis, random_subspace(D, 4, seed=1).basis)
    assert not torch.equal(one.basis, random_subspace(D, 4, seed=2).basis)
    assert torch.allclose(one.basis @ one.basis.T, torch.eye(4, dtype=torch.float64))
    overlaps = [random_subspace(D, 2, seed=seed).overlap(planted()) for seed in range(200)]
    assert abs(float(np.mean(overlaps)) - 2 / D) < 0.03
    assert random_subspace(D, D, 0).overlap(planted()) == pytest.approx(1)


def test_directions_become_orthonormal_in_their_order() -> None:
    rows = torch.tensor([[2.0, 0, 0], [4, 0, 0], [1, 3, 0]])
    found = from_directions(rows, "mine")
    assert torch.allclose(found.basis, torch.eye(3, dtype=torch.float64)[:2])
    assert torch.equal(found.first(1).basis, found.basis[:1])
    assert torch.allclose(found.coordinates(torch.tensor([[5.0, 6, 7]])), torch.tensor([[5.0, 6]]).double())


def test_files_come_back_and_damage_is_named(tmp_path: Path) -> None:
    found = {"a/first": pca(noise(50), 3, SITE), "b": random_subspace(D, 2, 0)}
    save_subspaces(tmp_path / "deep" / "s.safetensors", found)
    back = load_subspaces(tmp_path / "deep" / "s.safetensors")
    assert list(back) == list(found) and not list((tmp_path / "deep").glob(".*"))
    for name, each in found.items():
        assert torch.equal(back[name].basis, each.basis) and torch.equal(back[name].center, each.center)
        assert (back[name].method, back[name].site) == (each.method, each.site)
    with pytest.raises(FileNotFoundError):
        load_subspaces(tmp_path / "none")
    with pytest.raises(ValueError, match="no subspaces"):
        save_subspaces(tmp_path / "x", {})
    whole = (tmp_path / "deep" / "s.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="cut is damaged"):
        load_subspaces(tmp_path / "cut")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other does not hold subspaces"):
        load_subspaces(tmp_path / "other")


def test_the_smallest_number_of_dimensions_is_where_the_curve_stays_up() -> None:
    assert smallest_k({1: 0.1, 2: 0.5, 4: 0.91, 8: 0.95}, full=1.0) == 4
    assert smallest_k({1: 0.95, 2: 0.5, 4: 0.91}, full=1.0) == 4
    assert smallest_k({1: 0.1, 2: 0.2}, full=1.0) is None
    assert smallest_k({1: 0.1, 2: 0.2}, full=0.2) == 2
    for effects, full in (({}, 1.0), ({1: 0.5}, 0.0), ({1: 0.5}, float("nan"))):
        with pytest.raises(ValueError, match="no share of a full effect"):
            smallest_k(effects, full)


def test_edits_of_a_subspace(tiny_model: HookedVLA) -> None:
    obs, draw = make_observation(2), torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    width = tiny_model.hook_points[SITE].shape[-1]
    assert isinstance(width, int)
    space = random_subspace(width, 3, 0, SITE, center=torch.full((width,), 0.5))
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(obs, SITE, draw)
        _, edited = tiny_model.run_with_cache(obs, SITE, draw, edits=[space.project_out(tokens="language")])
        _, patched = tiny_model.run_with_cache(obs, SITE, draw, edits=[space.patch(torch.zeros(width))])
    mask = cache.segments["vlm"].mask("language")
    before, after = cache[SITE], edited[SITE]
    assert torch.equal(after[~mask], before[~mask])
    assert space.coordinates(after[mask]).abs().max() < 1e-4 < space.coordinates(before[mask]).abs().max()
    zero = (patched[SITE].double() @ space.basis.T).abs().max()
    assert zero < 1e-4
    outside = torch.eye(width, dtype=torch.float64) - space.basis.T @ space.basis
    assert_close((patched[SITE].double() @ outside).float(), (before.double() @ outside).float())


def test_what_is_no_subspace_is_refused() -> None:
    eye = torch.eye(3)
    for basis, center, message in (
        (torch.eye(4)[:, :3], torch.zeros(3), "a basis .k d. and a center"),
        (torch.ones(2, 3), torch.zeros(3), "not orthonormal"),
        (eye * float("nan"), torch.zeros(3), "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            Subspace(basis, center, "mine")
    x = noise(20)
    for make, message in (
        (lambda: pca(torch.full((4, 3), float("nan")), 1), "NaN or infinite numbers in 4 of 4 rows"),
        (lambda: pca(x, 11), "pca: 11 dimensions were asked for; there are 1 to 10"),
        (lambda: pca(torch.ones(5, 3), 1), "the activations do not differ"),
        (lambda: mean_difference(x, ["a"] * 20), "mean difference: all labels are 'a'"),
        (lambda: lda(x, ["a"] * 19), "20 rows of activations, but 19 labels"),
        (lambda: mean_difference(x, [i % 3 for i in range(20)], 3), "3 dimensions were asked for; there are 1 to 2"),
        (lambda: pca(x, 1, within=[0]), "20 rows of activations, but 1 of within"),
        (lambda: random_subspace(3, 4, 0), "random: 4 dimensions were asked for; there are 1 to 3"),
        (lambda: from_directions(torch.zeros(2, 3), "mine"), "directions are all zero"),
        (lambda: random_subspace(3, 2, 0).first(3), "random: 3 of 2 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
