"""Which feature to steer along, decided before any steering: the one whose activity goes best with a direction in which
the end effector is about to move, within tasks, in episodes that steering is not judged on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vla.analysis.metrics import ActionLayout
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.records import read_episodes, read_steps
from hooked_vla.rollouts.sae.collect import ROLLOUTS
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.rows import IDS
from hooked_vla.sae.store import TokenStore

with needs_analysis_extra():
    import pandas as pd

AXES = ("x", "y", "z")
Plan = tuple[int, int]
# rows that are encoded at once
_BLOCK = 4096


@dataclass(frozen=True)
class Choice:
    """A feature to steer along. axis: of the end effector, 0, 1 or 2; correlation: of the feature's activity with where
    the end effector goes along it next; density: share of tokens in which the feature is active."""

    site: str
    feature: int
    axis: int
    correlation: float
    density: float

    def direction(self, sae: SparseAutoencoder) -> Float[Tensor, " d"]:
        """The decoder's row in the model's units, turned so that more of it goes with more along the axis."""
        row = sae.splice(drop_negative=True).w_dec[self.feature].detach()
        return row if self.correlation >= 0 else -row


def motions(store: TokenStore, layout: ActionLayout) -> dict[Plan, tuple[str, np.ndarray]]:
    """(episode, environment step) of every plan -> the task, and how far the end effector goes until the next plan,
    metres."""
    folder = store.folder / ROLLOUTS
    about = {row["episode"]: row for row in read_episodes(folder).to_pylist()}
    steps = read_steps(folder).select(["episode", "chunk", "state"]).to_pandas()
    found: dict[Plan, tuple[str, np.ndarray]] = {}
    columns = list(layout.state_position)
    for episode, part in steps.groupby("episode", sort=False):
        row = about[int(str(episode))]
        states = np.stack([*part["state"], np.asarray(row["final_state"])])[:, columns]
        chunks = part["chunk"].to_numpy()
        starts = np.flatnonzero(np.diff(chunks, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(chunks)], strict=True):
            found[int(str(episode)), int(start)] = str(row["task"]), states[end] - states[start]
    return found


@torch.no_grad()
def activity(store: TokenStore, sae: SparseAutoencoder) -> tuple[list[Plan], np.ndarray, np.ndarray]:
    """Every plan, the features' mean activity over its tokens (and denoise steps) [plan feature], and the share of all
    tokens in which each feature is active."""
    site = sae.config.site
    ids = store.ids(site)[:, [IDS.index("episode"), IDS.index("env_step")]]
    plans, number = torch.unique(ids, dim=0, return_inverse=True)
    sums = torch.zeros(len(plans), sae.config.n_features)
    active = torch.zeros(sae.config.n_features)
    for rows in torch.arange(len(ids)).split(_BLOCK):
        f = sae.encode(store.read(site, rows).float())
        sums.index_add_(0, number[rows], f)
        active += (f != 0).sum(0)
    counts = torch.bincount(number, minlength=len(plans))[:, None]
    pairs = [(int(episode), int(step)) for episode, step in plans.tolist()]
    return pairs, (sums / counts).numpy(), (active / len(ids)).numpy()


def rank_features(
    store: TokenStore, sae: SparseAutoencoder, layout: ActionLayout, densities: tuple[float, float], n: int
) -> pd.DataFrame:
    """The n features whose activity goes best with a direction of motion, best first: feature, axis, correlation within
    tasks (both less their task's mean), density; only those with a density in the range.

    Raises ValueError where no feature is.
    """
    plans, f, density = activity(store, sae)
    moved = motions(store, layout)
    tasks = [moved[plan][0] for plan in plans]
    motion = np.stack([moved[plan][1] for plan in plans])
    r = _correlation(_within(f, tasks), _within(motion, tasks))
    least, most = densities
    r[(density < least) | (density > most)] = 0
    best = np.abs(r).argmax(1)
    size = np.abs(r).max(1)
    order = [int(each) for each in np.argsort(-size, kind="stable")[:n] if size[each] > 0]
    if not order:
        raise ValueError(
            f"{sae.config.label}: no feature is active in {least:g} to {most:g} of the tokens and goes with a motion"
        )
    return pd.DataFrame([
        {"site": sae.config.site, "feature": i, "axis": AXES[best[i]], "correlation": float(r[i, best[i]]),
         "density": float(density[i])}
        for i in order
    ])  # fmt: skip


def chosen(row: Mapping[str, object]) -> Choice:
    """A row of `rank_features`."""
    return Choice(
        str(row["site"]), int(str(row["feature"])), AXES.index(str(row["axis"])), float(str(row["correlation"])),
        float(str(row["density"])),
    )  # fmt: skip


def _within(values: np.ndarray, tasks: Sequence[str]) -> np.ndarray:
    """Each row less the mean of its task."""
    found = np.array(values, np.float64)
    for task in dict.fromkeys(tasks):
        mine = np.array([each == task for each in tasks])
        found[mine] -= found[mine].mean(0)
    return found


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of centred columns, [column of x, column of y]; 0 where one does not vary."""
    sizes = np.outer(np.linalg.norm(x, axis=0), np.linalg.norm(y, axis=0))
    return np.divide(x.T @ y, sizes, out=np.zeros_like(sizes), where=sizes > 1e-12)
