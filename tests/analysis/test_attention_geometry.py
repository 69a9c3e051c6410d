"""Where tokens stand in camera images: planted pixels are found again where the view says, in every family."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from hooked_vla import HookedVLA, Observation
from hooked_vla.analysis.attention import CameraView, camera_views
from hooked_vla.policy import resize_with_pad

HEIGHT, WIDTH = 72, 80


def _model(name: str) -> HookedVLA:
    return HookedVLA.from_spec(name, size="tiny", seed=0)


def _observation(model: HookedVLA, images: dict[str, np.ndarray]) -> Observation:
    n = len(next(iter(images.values())))
    return Observation(images, np.zeros((n, model.processor.features.d_state or 4), np.float32), ["put the block"] * n)


def _cameras(model: HookedVLA) -> tuple[str, ...]:
    return tuple(model.processor.features.cameras) or ("top", "wrist")


def _planted(model: HookedVLA, view: CameraView) -> tuple[Observation, list[tuple[int, int]]]:
    """Row 0: a plain scene; then one with every cell of one camera made bright in turn, but for what may belong to its
    neighbours after interpolation."""
    cells = [
        (r, c) for r in range(view.grid[0]) for c in range(view.grid[1]) if view.box(r, c)[1] and view.box(r, c)[3]
    ]
    plain = np.random.default_rng(0).integers(60, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    shown = np.repeat(plain[None], 1 + len(cells), axis=0)
    for i, cell in enumerate(cells, start=1):
        top, bottom, left, right = view.box(*cell)
        rows, columns = (slice(a + (b - a) // 3, b - (b - a) // 3) for a, b in ((top, bottom), (left, right)))
        shown[i, rows, columns] = 250
    images = {each: np.repeat(plain[None], len(shown), axis=0) for each in _cameras(model)} | {view.source: shown}
    return _observation(model, images), cells


def _found(model: HookedVLA, obs: Observation, view: CameraView, site: str) -> list[tuple[int, int]]:
    """The cell whose token changes most in each planted row."""
    with torch.no_grad():
        _, cache = model.run_with_cache(obs, site, stop_at=site)
    segments = cache.segments[cache.entries[site].streams["seq"]]
    rows = [i for i, at in enumerate(segments.positions(view.segment)) if len(at)]
    tokens = cache[site][rows]
    changes = view.on_grid((tokens[1:] - tokens[:1]).norm(dim=-1))
    return [tuple(int(x) for x in np.unravel_index(int(each.argmax()), view.grid)) for each in changes]


@pytest.mark.parametrize(
    ("name", "site", "tower"),
    [
        ("smolvla", "vision.hook_patch_embed", True),
        ("smolvla", "connector.hook_shuffled", False),
        ("pi05", "vision.hook_patch_embed", True),
        ("pi05", "connector.hook_out", False),
        ("openvla", "vision.siglip.hook_patch_embed", True),
        ("groot_n17", "vision.hook_patch_embed", True),
        ("groot_n17", "connector.hook_shuffled", False),
        ("act", "connector.hook_out", False),
    ],
)
def test_a_planted_cell_is_found_where_the_view_says(name, site, tower):
    model = _model(name)
    if not tower:
        # attention between patches carries them elsewhere: here the places of convolutions and mergers alone count
        for path, module in model.net.vision.named_modules():
            if path.endswith((".o_proj", ".down_proj")):
                torch.nn.init.zeros_(module.weight)
    plain = _observation(model, {each: np.zeros((1, HEIGHT, WIDTH, 3), np.uint8) for each in _cameras(model)})
    for view in camera_views(model, plain, tower).values():
        obs, cells = _planted(model, view)
        assert len(cells) >= 4
        assert _found(model, obs, view, site) == cells


def test_strided_convolutions_are_centred_on_their_kernels():
    model = _model("xvla")
    images = {each: np.zeros((64, 64, 3), np.uint8) for each in ("agent", "wrist")}
    view = camera_views(model, Observation(images, np.zeros(20, np.float32), "push"))["agent"]
    # what each pixel reaches through the tower's convolutions alone, all their weights 1
    reached = torch.eye(64)[:, None]
    for stage in model.net.vision.stages:
        kernel, stride, padding = (each[0] for each in (stage.conv.kernel_size, stage.conv.stride, stage.conv.padding))
        reached = functional.conv1d(reached, torch.ones(1, 1, kernel), stride=stride, padding=padding)
    assert view.n_before == 1 and reached.shape[-1] == view.grid[1]
    for pixel, row in enumerate(reached[:, 0]):
        if len(set((row == row.max()).nonzero().flatten().tolist())) == 1:
            assert view.column_of[pixel] == int(row.argmax()), pixel


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60), (64, 64)])
def test_padding_and_scaling_are_undone(height, width):
    model = _model("smolvla")
    images = {each: np.zeros((height, width, 3), np.uint8) for each in ("agent", "wrist")}
    view = camera_views(model, Observation(images, np.zeros(4, np.float32), "push"), tower=True)["agent"]
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    fitted = resize_with_pad(torch.stack([y, x, x])[None], 64, 64)[0]
    rows, columns = view.grid
    # cells that are partly padding, or stick out, are darker than what is seen of them
    whole = [view.box(r, c) for r in range(rows // 2, rows) for c in range(columns // 2, columns)]
    for channel, expected in zip(fitted, (y, x, x), strict=True):
        cells = channel.unfold(0, 64 // rows, 64 // rows).unfold(1, 64 // columns, 64 // columns).mean((-2, -1))
        back = view.on_image(cells.numpy())
        for top, bottom, left, right in whole:
            assert back[top:bottom, left:right].mean() == pytest.approx(
                float(expected[top:bottom, left:right].mean()), abs=0.02
            )


def test_padding_is_where_each_family_puts_it():
    images = {each: np.zeros((48, 80, 3), np.uint8) for each in ("agent", "wrist")}
    obs = Observation(images, np.zeros(4, np.float32), "push")
    # 48 × 80 fitted into a square leaves 40 % of its height empty: above the image, or half above and half below
    below, centred = (camera_views(_model(name), obs, tower=True)["agent"] for name in ("smolvla", "pi05"))
    n_rows = below.grid[0]
    assert set(below.row_of) == set(range(int(0.4 * n_rows), n_rows))
    assert set(centred.row_of) == set(range(int(0.2 * centred.grid[0]), int(np.ceil(0.8 * centred.grid[0]))))
    assert below.seen.all() and centred.seen.all()


def test_what_a_crop_cuts_off_reaches_no_token():
    model = _model("diffusion")
    images = {each: np.zeros((48, 80, 3), np.uint8) for each in ("agent", "wrist")}
    view = camera_views(model, Observation(images, np.zeros(4, np.float32), ""))["agent"]
    cut = ~view.seen
    assert cut.any() and cut[0].all() and cut[:, 0].all()
    assert np.isnan(view.on_image(np.ones(view.grid))[cut]).all()
    assert view.counts(np.ones_like(cut)).sum() == view.seen.sum()


def test_counts_and_boxes_agree():
    model = _model("pi05")
    images = {each: np.zeros((48, 80, 3), np.uint8) for each in ("agent", "wrist")}
    view = camera_views(model, Observation(images, np.zeros(4, np.float32), "push"))["wrist"]
    for row, column in np.ndindex(*view.grid):
        top, bottom, left, right = view.box(row, column)
        mask = np.zeros(view.seen.shape, bool)
        mask[top:bottom, left:right] = True
        expected = np.zeros(view.grid, int)
        expected[row, column] = (bottom - top) * (right - left)
        assert (view.counts(mask) == expected).all()


def test_wrong_shapes_are_named():
    model = _model("smolvla")
    images = {each: np.zeros((48, 80, 3), np.uint8) for each in ("agent", "wrist")}
    view = camera_views(model, Observation(images, np.zeros(4, np.float32), "push"))["agent"]
    with pytest.raises(ValueError, match=r"camera 'agent' has 4 tokens .* got 5"):
        view.on_grid(torch.zeros(5))
    with pytest.raises(ValueError, match=r"48 × 80 pixels, the mask has \[80, 48\]"):
        view.counts(np.ones((80, 48), bool))
    with pytest.raises(ValueError, match="has a grid of"):
        view.on_image(np.zeros((7, 7)))


def test_a_processor_that_bends_the_image_is_refused(monkeypatch):
    model = _model("smolvla")

    def bent(images, width, height):
        grid = torch.linspace(0, 1, images.shape[-1]) ** 2 * (images.shape[-1] - 1)
        return resize_with_pad(images[..., grid.round().long()], width, height)

    monkeypatch.setattr(type(model.processor), "resize", staticmethod(bent))
    images = {each: np.zeros((48, 80, 3), np.uint8) for each in ("agent", "wrist")}
    with pytest.raises(ValueError, match="more than scale, pad and crop along columns"):
        camera_views(model, Observation(images, np.zeros(4, np.float32), "push"))
