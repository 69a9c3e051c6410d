"""Linear subspaces of a site's activations: found in several ways, compared, saved, and made into edits.

Every finder takes activations x [n d], one row a token or a pooled token, and gives an orthonormal basis whose first k
rows are its own answer for k dimensions, so that a curve over k needs one of it. `within` names rows that share
something which is not meant (a scene, a place in the prompt): each group's mean is subtracted first, so that what is
found is contrasted inside the groups.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_vla.analysis.probes import Probe
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks.cache_file import write_safetensors
from hooked_vla.interventions import ProjectOut, SubspacePatch

FORMAT = "hooked_vla subspaces 1"
# how far rows of a basis may be from orthonormal: float32 that was written and read
_ORTHONORMAL = 1e-4
# singular values below this share of the largest are rounding
_RANK = 1e-6


@dataclass(frozen=True, eq=False)
class Subspace:
    """basis: orthonormal rows, the first ones first where they are ordered. center: a point that the subspace goes
    through, the mean of what it was fitted on. method: how it was found. site: the hook point; "" where it has none.

    Raises ValueError for a basis that is not orthonormal, more rows than channels, or numbers that are not finite.
    """

    basis: Float[Tensor, "k d"]
    center: Float[Tensor, " d"]
    method: str
    site: str = ""

    def __post_init__(self) -> None:
        basis, center = (each.detach().to("cpu", torch.float64) for each in (self.basis, self.center))
        if basis.ndim != 2 or not 1 <= basis.shape[0] <= basis.shape[1] or center.shape != basis.shape[1:]:
            raise ValueError(
                f"a subspace has a basis [k d] and a center [d], got {list(basis.shape)}, {list(center.shape)}"
            )
        if not (basis.isfinite().all() and center.isfinite().all()):
            raise ValueError(f"{self.method}: basis or center has NaN or infinite numbers")
        off = float((basis @ basis.T - torch.eye(len(basis), dtype=torch.float64)).abs().max())
        if off > _ORTHONORMAL:
            raise ValueError(f"{self.method}: the basis is not orthonormal (off by {off:.2g}); see from_directions")
        object.__setattr__(self, "basis", basis)
        object.__setattr__(self, "center", center)

    @property
    def k(self) -> int:
        """How many dimensions."""
        return len(self.basis)

    @property
    def d(self) -> int:
        """How many dimensions there are around it."""
        return self.basis.shape[1]

    def first(self, k: int) -> "Subspace":
        """The span of the first k rows. Raises ValueError for more than there are, or none."""
        if not 1 <= k <= self.k:
            raise ValueError(f"{self.method}: {k} of {self.k} dimensions")
        return replace(self, basis=self.basis[:k])

    def coordinates(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n k"]:
        """Where x lies in the subspace, from the center."""
        return (x.to(torch.float64) - self.center) @ self.basis.T

    def share(self, x: Float[Tensor, "n d"], within: Sequence[Hashable] | None = None) -> float:
        """Share of the spread of x (around its mean, or its groups' means) that is in the subspace."""
        x = _centred(x, within)
        return float((x @ self.basis.T).square().sum() / x.square().sum())

    def overlap(self, other: "Subspace") -> float:
        """Mean squared cosine of the principal angles: 1 where the smaller one lies in the other, 0 where they are
        orthogonal; k / d on average for a random one."""
        return float((self.basis @ other.basis.T).square().sum() / min(self.k, other.k))

    def patch(self, source: Any, **where: Any) -> SubspacePatch:
        """The edit that takes another run's part in the subspace; where: tokens, denoise, ... of the edit."""
        return SubspacePatch(self.site, source, self.basis.float(), **where)

    def project_out(self, strength: float = 1.0, **where: Any) -> ProjectOut:
        """The edit that leaves the center's part in the subspace; where: tokens, denoise, ... of the edit."""
        return ProjectOut(self.site, self.basis.float(), strength, self.center.float(), **where)


def from_directions(
    directions: Float[Tensor, "k d"], method: str, site: str = "", center: Float[Tensor, " d"] | None = None
) -> Subspace:
    """The span of directions in their order (Gram-Schmidt): those in the span of earlier ones add nothing.

    Raises ValueError where all are zero.
    """
    directions = directions.detach().to("cpu", torch.float64)
    kept: list[Tensor] = []
    for direction in directions:
        rest = direction
        # twice is enough (Giraud, Langou & Rozložník 2005)
        for _ in range(2):
            for row in kept:
                rest = rest - (rest @ row) * row
        if rest.norm() > _RANK * direction.norm() and direction.norm() > 0:
            kept.append(rest / rest.norm())
    if not kept:
        raise ValueError(f"{method}: directions are all zero")
    return Subspace(
        torch.stack(kept), directions.new_zeros(directions.shape[1]) if center is None else center, method, site
    )


def pca(
    x: Float[Tensor, "n d"],
    k: int | None = None,
    site: str = "",
    within: Sequence[Hashable] | None = None,
    method: str = "pca",
) -> Subspace:
    """The k directions of largest spread, in this order; k None: all in which x spreads.

    Raises ValueError for NaN, or more dimensions than x spreads in.
    """
    return _principal(_centred(x, within), _mean(x), k, method, site)


def paired_pca(
    first: Float[Tensor, "n d"], second: Float[Tensor, "n d"], k: int | None = None, site: str = "",
    method: str = "paired pca",
) -> Subspace:  # fmt: skip
    """The k directions along which pairs differ most: what changes when one thing about an input is changed.

    first, second: the two of each pair. Raises as `pca`.
    """
    return _principal(_finite(second) - _finite(first), _mean(torch.cat([first, second])), k, method, site)


def mean_difference(
    x: Float[Tensor, "n d"],
    labels: Sequence[Hashable],
    k: int | None = None,
    site: str = "",
    within: Sequence[Hashable] | None = None,
    method: str = "mean difference",
) -> Subspace:
    """The span of the differences of class means, largest spread between classes first; at most classes - 1 dimensions
    (k None: all). For two classes it is the direction from one mean to the other.

    With `within`, means are taken, and compared, inside every group: at every place of a prompt, say.
    Raises ValueError for NaN, one class, or more dimensions than the means span.
    """
    classes = _classes(labels, len(x), method)
    centred = _centred(x, within)
    cells = list(zip(within, classes, strict=True)) if within is not None else list(classes)
    names = list(dict.fromkeys(cells))
    number = torch.tensor([names.index(each) for each in cells])
    counts = torch.bincount(number)
    means = torch.zeros(len(names), x.shape[1], dtype=torch.float64).index_add_(0, number, centred) / counts[:, None]
    return _principal(means * counts.sqrt()[:, None], _mean(x), k, method, site)


def lda(
    x: Float[Tensor, "n d"],
    labels: Sequence[Hashable],
    k: int | None = None,
    site: str = "",
    within: Sequence[Hashable] | None = None,
    method: str = "lda",
) -> Subspace:
    """Linear discriminants: directions along which classes are far apart for how much they spread (Fisher 1936), best
    first; at most classes - 1 (k None: all). The covariance inside classes is shrunk as Ledoit & Wolf (2004) choose.

    Raises as `mean_difference`.
    """
    classes = _classes(labels, len(x), method)
    with needs_analysis_extra():
        from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    names = list(dict.fromkeys(classes))
    number = [names.index(each) for each in classes]
    fitted: Any = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto").fit(_centred(x, within).numpy(), number)
    most = min(len(names) - 1, x.shape[1])
    wanted = _how_many(k, most, method)
    directions = torch.from_numpy(np.ascontiguousarray(fitted.scalings_[:, :most].T))
    return from_directions(directions, method, site, _mean(x)).first(wanted)


def from_probes(probes: Probe | Sequence[Probe], site: str = "", method: str = "probe") -> Subspace:
    """The span of what probes read, largest weights first; center: the mean of the activations of the first one.

    Raises ValueError for probes of different widths.
    """
    given = [probes] if isinstance(probes, Probe) else list(probes)
    rows = torch.from_numpy(np.concatenate([each.directions for each in given]))
    return _principal(rows, torch.from_numpy(given[0].center), None, method, site)


def random_subspace(
    d: int, k: int, seed: int, site: str = "", center: Float[Tensor, " d"] | None = None, method: str = "random"
) -> Subspace:
    """k dimensions of d, every subspace equally likely: the control of the same size.

    Raises ValueError for k outside 1..d.
    """
    _how_many(k, d, method)
    drawn = torch.randn(d, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    # without the signs of r, the directions would not be uniform (Mezzadri 2007)
    basis = (q * torch.sign(torch.diagonal(r))).T
    return Subspace(basis, torch.zeros(d, dtype=torch.float64) if center is None else center, method, site)


def smallest_k(effects: Mapping[int, float], full: float, share: float = 0.9) -> int | None:
    """The smallest number of dimensions from which on every larger one measured has `share` of the full effect.

    effects: by number of dimensions; full: of all dimensions. None where no number suffices.
    Raises ValueError for no effects, or a full effect that is not above 0: a share of nothing says nothing.
    """
    if not effects or not full > 0:
        raise ValueError(f"no share of a full effect of {full} over {len(effects)} numbers of dimensions")
    found = None
    for k in sorted(effects, reverse=True):
        if not effects[k] >= share * full:
            break
        found = k
    return found


def save_subspaces(path: str | Path, subspaces: Mapping[str, Subspace]) -> None:
    """Write subspaces under names into one safetensors file, which appears when complete.

    Raises ValueError for none.
    """
    if not subspaces:
        raise ValueError("no subspaces to save")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {name: {"method": each.method, "site": each.site} for name, each in subspaces.items()}
    tensors = {
        f"{name}/{part}": getattr(each, part) for name, each in subspaces.items() for part in ("basis", "center")
    }
    write_safetensors(
        path,
        [(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in tensors.items()],
        {"format": FORMAT, "subspaces": json.dumps(about)},
    )


def load_subspaces(path: str | Path) -> dict[str, Subspace]:
    """The subspaces of a file by name.

    Raises FileNotFoundError where there is none, ValueError for a file that is damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            note = file.metadata() or {}
            if note.get("format") != FORMAT:
                raise ValueError(
                    f"{path} does not hold subspaces: its format is {note.get('format')!r}, not {FORMAT!r}"
                )
            about = json.loads(note["subspaces"])
            return {
                name: Subspace(file.get_tensor(f"{name}/basis"), file.get_tensor(f"{name}/center"), **each)
                for name, each in about.items()
            }
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _principal(rows: Tensor, center: Tensor, k: int | None, method: str, site: str) -> Subspace:
    """Right singular vectors of the rows, largest first."""
    _, sizes, vectors = torch.linalg.svd(rows.to(torch.float64), full_matrices=False)
    rank = int((sizes > _RANK * max(float(sizes[0]), 1e-30)).sum())
    return Subspace(vectors[: _how_many(k, rank, method)], center, method, site)


def _how_many(k: int | None, most: int, method: str) -> int:
    if most < 1:
        raise ValueError(f"{method}: the activations do not differ: there is no direction to find")
    if k is not None and not 1 <= k <= most:
        raise ValueError(f"{method}: {k} dimensions were asked for; there are 1 to {most}")
    return most if k is None else k


def _centred(x: Tensor, within: Sequence[Hashable] | None) -> Tensor:
    """x minus its mean, or that of each row's group."""
    x = _finite(x)
    if within is None:
        return x - x.mean(0)
    if len(within) != len(x):
        raise ValueError(f"{len(x)} rows of activations, but {len(within)} of within")
    index = {name: i for i, name in enumerate(dict.fromkeys(within))}
    number = torch.tensor([index[each] for each in within])
    sums = torch.zeros(len(index), x.shape[1], dtype=x.dtype).index_add_(0, number, x)
    return x - (sums / torch.bincount(number)[:, None])[number]


def _mean(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64).mean(0)


def _finite(x: Tensor) -> Tensor:
    x = x.detach().to("cpu", torch.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"activations must be [n d] with 2 rows or more, got {list(x.shape)}")
    if bad := (~x.isfinite().all(1)).nonzero().flatten().tolist():
        raise ValueError(f"activations have NaN or infinite numbers in {len(bad)} of {len(x)} rows, first {bad[:5]}")
    return x


def _classes(labels: Sequence[Hashable], n: int, method: str) -> list[Hashable]:
    classes = list(labels)
    if len(classes) != n:
        raise ValueError(f"{method}: {n} rows of activations, but {len(classes)} labels")
    if len(set(classes)) < 2:
        raise ValueError(f"{method}: all labels are {classes[0]!r}: there is nothing to tell apart")
    return classes
