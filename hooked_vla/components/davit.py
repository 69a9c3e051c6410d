"""DaViT (arXiv 2204.03645): stages of a convolution and of blocks that attend twice, first between tokens inside
windows, then between channels over all tokens.

Tokens stand row by row in [image seq d_model], and the (height, width) that they form goes along. Read from
transformers 5.5, models/florence2. Windows that reach over the right or lower edge are filled up with zeros, and these
are attended like tokens.
"""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components.attention import SelfAttention
from hooked_vla.components.mlp import MLP
from hooked_vla.components.norm import LayerNorm, StreamLayerNorm
from hooked_vla.hooks.point import HookPoint
from hooked_vla.spec import ConvTowerSpec

Grid = tuple[int, int]
Tokens = Float[Tensor, "image seq d_model"]
Map = Float[Tensor, "image channel height width"]


def to_grid(x: Tokens, grid: Grid) -> Map:
    return rearrange(x, "i (h w) d -> i d h w", h=grid[0])


def to_tokens(x: Map) -> Tokens:
    return rearrange(x, "i d h w -> i (h w) d")


def to_windows(x: Tokens, grid: Grid, side: int) -> Float[Tensor, "window position d_model"]:
    """Square windows, each image's row by row; what sticks out over the right and lower edge is 0."""
    height, width = grid
    on_grid = rearrange(x, "i (h w) d -> i h w d", h=height)
    padded = functional.pad(on_grid, (0, 0, 0, -width % side, 0, -height % side))
    return rearrange(padded, "i (ny y) (nx x) d -> (i ny nx) (y x) d", y=side, x=side)


def from_windows(x: Float[Tensor, "window position d_model"], grid: Grid, side: int) -> Tokens:
    """The inverse of `to_windows`."""
    height, width = grid
    on_grid = rearrange(
        x, "(i ny nx) (y x) d -> i (ny y) (nx x) d", ny=-(-height // side), nx=-(-width // side), y=side
    )  # fmt: skip
    return rearrange(on_grid[:, :height, :width], "i h w d -> i (h w) d")


class WindowAttention(SelfAttention):
    """Tokens attend to the tokens of their own window; each window is a row of queries, keys, values and patterns."""

    def __init__(self, d_model: int, n_heads: int, side: int, stream: str) -> None:
        super().__init__(d_model, n_heads, n_heads, d_model // n_heads, bias=True)
        self.side, self.stream = side, stream
        points = (self.hook_q, self.hook_k, self.hook_v, self.hook_attn_scores, self.hook_pattern, self.hook_z)
        for point in points:
            point.axes = ("window", *point.axes[1:])

    def forward(self, x: Tokens, grid: Grid) -> Tokens:
        windows = to_windows(x, grid, self.side)
        mixed = self.attend(self.queries(windows), *self.keys_values(windows), mask=None)
        return from_windows(mixed, grid, self.side)


class ChannelAttention(SelfAttention):
    """The channels of a head attend to each other; what they compare is their values over all tokens of the image.

    z[token, channel] = Σ pattern[channel, other] v[token, other], scores scaled by 1 / sqrt(number of tokens).
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__(d_model, n_heads, n_heads, d_model // n_heads, bias=True)
        self.query_channel = self.key_channel = self.d_head
        self.hook_attn_scores = HookPoint("batch n_heads query_channel key_channel", dtype="float32")
        self.hook_pattern = HookPoint("batch n_heads query_channel key_channel")

    def forward(self, x: Tokens, grid: Grid) -> Tokens:
        k, v = self.keys_values(x)
        # channels where `mix` has tokens, tokens where it has dimensions
        q, k, v = (rearrange(each, "i s h c -> i c h s") for each in (self.queries(x), k, v))
        z = self.mix(q, k, v, mask=None, scale=x.shape[1] ** -0.5)
        return self.o_proj(rearrange(self.hook_z(rearrange(z, "i c h s -> i s h c")), "i s h c -> i s (h c)"))


class ConvBlock(nn.Module):
    """resid_mid = resid_pre + conv1_out + attn_out, resid_post = resid_mid + conv2_out + mlp_out."""

    def __init__(self, d_model: int, d_mlp: int, act: str, eps: float, attn: nn.Module) -> None:
        super().__init__()
        self.d_model = d_model
        self.conv1 = nn.Conv2d(d_model, d_model, kernel_size=3, padding=1, groups=d_model)
        self.ln1, self.attn = LayerNorm(d_model, eps), attn
        self.conv2 = nn.Conv2d(d_model, d_model, kernel_size=3, padding=1, groups=d_model)
        self.ln2, self.mlp = LayerNorm(d_model, eps), MLP(d_model, d_mlp, act)
        self.hook_resid_pre = HookPoint("batch seq d_model")
        self.hook_conv1_out = HookPoint("batch seq d_model")
        self.hook_attn_out = HookPoint("batch seq d_model")
        self.hook_resid_mid = HookPoint("batch seq d_model")
        self.hook_conv2_out = HookPoint("batch seq d_model")
        self.hook_mlp_out = HookPoint("batch seq d_model")
        self.hook_resid_post = HookPoint("batch seq d_model")

    def forward(self, resid_pre: Tokens, grid: Grid) -> Tokens:
        resid_pre = self.hook_resid_pre(resid_pre)
        x = resid_pre + self.hook_conv1_out(to_tokens(self.conv1(to_grid(resid_pre, grid))))
        resid_mid = self.hook_resid_mid(x + self.hook_attn_out(self.attn(self.ln1(x), grid)))
        x = resid_mid + self.hook_conv2_out(to_tokens(self.conv2(to_grid(resid_mid, grid))))
        return self.hook_resid_post(x + self.hook_mlp_out(self.mlp(self.ln2(x))))


class DualBlock(nn.Module):
    """A block that attends inside windows, then one that attends between channels."""

    def __init__(self, spatial: ConvBlock, channel: ConvBlock) -> None:
        super().__init__()
        self.spatial, self.channel = spatial, channel

    def forward(self, x: Tokens, grid: Grid) -> Tokens:
        return self.channel(self.spatial(x, grid), grid)


class Stage(nn.Module):
    """A convolution to a smaller grid of wider tokens, normed before or after, then blocks.

    stream: the token stream of the stage's grid; its windows are `<stream>.windows`. before: that of what comes in.
    """

    def __init__(self, spec: ConvTowerSpec, number: int, stream: str, before: str) -> None:
        super().__init__()
        d_in = spec.d_model[number - 1] if number else 3
        self.d_model, self.prenorm, self.stream = spec.d_model[number], spec.prenorm[number], stream
        kernel, stride, padding = spec.kernel[number], spec.stride[number], spec.padding[number]
        self.conv = nn.Conv2d(d_in, self.d_model, kernel_size=kernel, stride=stride, padding=padding)
        if self.prenorm:
            self.ln_in = StreamLayerNorm(d_in, spec.eps, before)
        else:
            self.ln_pre = LayerNorm(self.d_model, spec.eps)
            self.hook_patch_embed = HookPoint("batch seq d_model")
        self.hook_tokens = HookPoint("batch seq d_model")
        self.blocks = nn.ModuleList(_block(spec, number, f"{stream}.windows") for _ in range(spec.n_layers[number]))

    def forward(self, x: Map) -> Float[Tensor, "image d_model rows columns"]:
        if self.prenorm:
            x = to_grid(self.ln_in(to_tokens(x)), (x.shape[-2], x.shape[-1]))
        x = self.conv(x)
        tokens, grid = to_tokens(x), (x.shape[-2], x.shape[-1])
        tokens = self.hook_tokens(tokens if self.prenorm else self.ln_pre(self.hook_patch_embed(tokens)))
        for block in self.blocks:
            tokens = block(tokens, grid)
        return to_grid(tokens, grid)

    def grid(self, before: Grid) -> Grid:
        """The grid made of the one before.

        Raises ValueError when nothing is left of it.
        """
        (kernel, _), (stride, _) = self.conv.kernel_size, self.conv.stride
        padding = self.conv.padding[0]
        assert isinstance(padding, int)
        height, width = ((size + 2 * padding - kernel) // stride + 1 for size in before)
        if min(height, width) < 1:
            raise ValueError(f"the image is too small: a stage of the tower gets {before[0]} × {before[1]} tokens")
        return height, width


class ConvTower(nn.Module):
    """Normalised images to the tokens of the last stage, not normed."""

    def __init__(self, spec: ConvTowerSpec) -> None:
        super().__init__()
        streams = [f"vision.stages.{i}" for i in range(len(spec.d_model))]
        self.side = spec.window
        self.stages = nn.ModuleList(
            Stage(spec, i, stream, before)
            for i, (stream, before) in enumerate(zip(streams, ["", *streams], strict=False))
        )

    def forward(self, images: Float[Tensor, "image 3 height width"]) -> tuple[Tokens, Grid]:
        """Features of every place of the last grid, and that grid."""
        x = images.to(next(self.parameters()).dtype)
        for stage in self.stages:
            x = stage(x)
        return to_tokens(x), (x.shape[-2], x.shape[-1])

    def grids(self, height: int, width: int) -> list[Grid]:
        """The grid of every stage for images of this size, in pixels."""
        found, grid = [], (height, width)
        for stage in self.stages:
            assert isinstance(stage, Stage)
            grid = stage.grid(grid)
            found.append(grid)
        return found


def _block(spec: ConvTowerSpec, number: int, windows: str) -> DualBlock:
    d_model = spec.d_model[number]
    sizes = (d_model, spec.d_mlp[number], spec.act, spec.eps)
    return DualBlock(
        spatial=ConvBlock(*sizes, WindowAttention(d_model, spec.n_heads[number], spec.window, windows)),
        channel=ConvBlock(*sizes, ChannelAttention(d_model, spec.n_groups[number])),
    )
