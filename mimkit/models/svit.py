"""SViT: a vision transformer with super token attention, for classification and masked pre-training.

Huang et al., "Vision Transformer with Super Token Sampling", CVPR 2023.

The network has four stages, with tokens at strides 4, 8, 16 and 32. In the first two stages, each token is softly
assigned to the super tokens around it, the super tokens attend to each other, and the result is distributed back to
the tokens. In the last two stages each token is its own super token, which is ordinary attention. A 3 x 3 convolution
in every block encodes positions.

Convolutions and associations cross the borders of mask units, so skipping masked units needs two rules. The state of
the network holds the tokens of the visible units only. An association treats a masked neighbor as zero, like a neighbor
beyond the border of the image. A convolution replaces a masked neighbor by the mean of the image's visible tokens. With
nothing masked, this is the ordinary network.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerScale
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.units import Grid, Grids, UnitMask, one_grid, replace_masked, unit_grid

UNIT_TOKENS = 8  # tokens of the first stage along a side of a mask unit, which is one token of the last stage
STEM_STRIDES = {4: (2, 1, 2, 1), 2: (2, 1, 1, 1), 1: (1, 1, 1, 1)}  # strides of the convolutions, by patch size


class Places(NamedTuple):
    """The tokens that a state holds.

    A state is either the whole map (b h w d), or the k x k tokens of each visible unit (b v k k d). With `skip=False`
    the state is the whole map, but only visible units count in the statistics of normalization.
    """

    visible: Tensor | None = None  # (b v), indices of visible units; None for all
    grid: Grid = (0, 0)  # grid of units
    skip: bool = True  # whether the state holds visible units only

    def unit_index(self) -> tuple[Any, ...]:
        """Return the index that selects the visible units (b v k k ...) of a map in the form (b gh k gw k ...)."""
        assert self.visible is not None
        image = torch.arange(len(self.visible), device=self.visible.device)[:, None]
        return image, self.visible // self.grid[1], slice(None), self.visible % self.grid[1]

    def visible_units(self, x: Tensor) -> Tensor:
        """Select the visible units of a map: (b h w ...) -> (b v k k ...)."""
        gh, gw = self.grid
        return x.unflatten(2, (gw, -1)).unflatten(1, (gh, -1))[self.unit_index()]

    def to_map(self, x: Tensor, average: bool = False) -> Tensor:
        """Return the map (b h w ...) of a state. Masked units are zero, or the mean of the image's visible tokens."""
        if self.visible is None or not self.skip:
            return x
        (gh, gw), k = self.grid, x.shape[2]
        fill = at_least_float32(x).mean(dim=(1, 2, 3)).to(x.dtype) if average else x.new_zeros(x.shape[0], *x.shape[4:])
        maps = fill[:, None, None, None, None].expand(-1, gh, k, gw, k, *x.shape[4:]).clone()
        maps[self.unit_index()] = x
        return maps.flatten(3, 4).flatten(1, 2)

    def to_state(self, x: Tensor) -> Tensor:
        """Return the state of a map (b h w ...), the inverse of `to_map`. Values at masked positions are dropped."""
        return x if self.visible is None or not self.skip else self.visible_units(x)

    def statistics_part(self, x: Tensor) -> Tensor:
        """Return the part of a state that counts in the statistics of normalization: the visible tokens."""
        return x if self.visible is None or self.skip else self.visible_units(x)


# Operations that combine tokens --------------------------------------------------------------------------------------


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half precision to float32, for sums and quotients that half precision cannot represent."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def convolve(conv: Any, x: Tensor, places: Places) -> Tensor:
    """Apply a 3 x 3 convolution to a state: (... d) -> (... d'). A stride of 2 halves height and width.

    A masked neighbor is replaced by the mean of the image's visible tokens. Tokens share a large mean, so with zeros
    the output would depend on the number of masked neighbors more than on the image: after such a pre-training,
    features of whole images were 1.4 standard deviations away from those of masked images
    (benchmarks/cifar10_probe.md).
    """
    x = conv(rearrange(places.to_map(x, average=True), "b h w d -> b d h w"))
    return places.to_state(rearrange(x, "b d h w -> b h w d"))


def batch_norm(norm: Any, x: Tensor, places: Places) -> Tensor:
    """Apply batch normalization to a state: (... d) -> (... d), with the statistics of visible tokens.

    Raises:
        UserError: there is a single token, whose standard deviation is 0.
    """
    counted = places.statistics_part(x) if norm.training else x
    if norm.training and counted.numel() == counted.shape[-1]:
        raise UserError(
            "SViT's batch normalization needs two or more visible tokens in each micro-batch of a process, but there "
            "is one: take a larger batch or image, fewer --grad-accum-steps, or a lower --mask-ratio."
        )
    if counted is x:
        # one long image in the channels-last layout, for which the kernels are fastest
        return rearrange(norm(rearrange(x, "b ... d -> b d (...) 1")), "b d t 1 -> b t d").view(x.shape)
    counted = at_least_float32(counted).flatten(0, -2)
    var, mean = torch.var_mean(counted, dim=0, correction=0)
    with torch.no_grad():
        t = len(counted)
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_((var * (t / max(t - 1, 1))).to(norm.running_var.dtype), norm.momentum)
    scale = norm.weight * (var + norm.eps).rsqrt()
    return torch.addcmul(norm.bias - mean * scale, x, scale).to(x.dtype)


def neighbors(x: Tensor) -> Tensor:
    """Collect the 3 x 3 neighborhood of each position, zero beyond the border: (b h w d) -> (b h w 9 d)."""
    h, w = x.shape[1:3]
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    return torch.stack([x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], dim=3)


def to_neighbors(x: Tensor) -> Tensor:
    """Send each of nine parts to its neighbor and sum what arrives, the adjoint of `neighbors`.

    (b h w 9 d) -> (b h w d)
    """
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    parts = [F.pad(part, (0, 0, j, -j, i, -i)) for part, (i, j) in zip(x.unbind(3), shifts, strict=True)]
    return torch.stack(parts).sum(0)


class SuperTokenAttention(nn.Module):
    """Super token attention (paper, section 3.2).

    1. Each super token starts as the mean of a cell of cell x cell tokens.
    2. Each token is associated with the 3 x 3 super tokens around its cell, by a softmax of their dot products.
    3. Each super token becomes the mean of its tokens, weighted by the association.
    4. Super tokens attend to each other.
    5. Each token becomes the sum of its super tokens, weighted by the association.

    As in the paper's code, no gradient flows through the association. With `cell=1` this is ordinary attention.

    Args:
        cell: tokens along a side of the cell of a super token.
    """

    def __init__(self, dim: int, num_heads: int, cell: int):
        super().__init__()
        self.num_heads, self.cell = num_heads, cell
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor) -> Tensor:
        """(b ... d) -> (b ... d), multi-head self-attention among all tokens of an image"""
        qkv = self.qkv(x.flatten(1, -2))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(out, "b h n d -> b n (h d)")).view(x.shape)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """(... d) -> (... d)"""
        if self.cell == 1:
            return self.attend(x)
        (h, w), c = x.shape[-3:-1], self.cell
        if h % c or w % c:
            x = F.pad(x, (0, 0, 0, -w % c, 0, -h % c))
        cells = rearrange(x, "... (hh i) (ww j) d -> ... hh ww (i j) d", i=c, j=c)
        tokens = cells.mean(dim=-2)  # super tokens (... hh ww d)
        with torch.no_grad():
            logits = cells @ self.gather_neighbors(tokens * tokens.shape[-1] ** -0.5, places).mT
            association = logits.softmax(dim=-1).to(x.dtype)  # (... hh ww i*j 9)
            mass = self.scatter_to_neighbors(at_least_float32(association).sum(-2)[..., None], places)
        sums = self.scatter_to_neighbors(at_least_float32(association.mT @ cells), places)
        tokens = (sums / (mass + 1e-12)).to(x.dtype)
        cells = association @ self.gather_neighbors(self.attend(tokens), places)
        return rearrange(cells, "... hh ww (i j) d -> ... (hh i) (ww j) d", i=c)[..., :h, :w, :]

    @staticmethod
    def gather_neighbors(tokens: Tensor, places: Places) -> Tensor:
        """Collect the 3 x 3 super tokens around each cell, zero where masked: (... hh ww d) -> (... hh ww 9 d)."""
        return places.to_state(neighbors(places.to_map(tokens)))

    @staticmethod
    def scatter_to_neighbors(parts: Tensor, places: Places) -> Tensor:
        """Sum what super tokens receive from the cells around them: (... hh ww 9 d) -> (... hh ww d)."""
        return places.to_state(to_neighbors(places.to_map(parts)))


# The network ---------------------------------------------------------------------------------------------------------


class Stem(nn.Module):
    """Stem of four 3 x 3 convolutions, each followed by GELU and batch normalization.

    With patches of 4, a token has a receptive field of 19 x 19 pixels.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int):
        super().__init__()
        widths = (in_chans, dim // 2, dim // 2, dim, dim)
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1) for i, stride in enumerate(STEM_STRIDES[patch_size])
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """(... c) -> (... d), from pixels to tokens"""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = batch_norm(norm, F.gelu(convolve(conv, x, places)), places)
        return x


class ConvMlp(nn.Module):
    """MLP with a residual depthwise convolution on its hidden map (paper: ConvFFN)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """(... d) -> (... d)"""
        x = F.gelu(self.fc1(x))
        return self.fc2(x + convolve(self.conv, x, places))


class SuperTokenBlock(nn.Module):
    """Convolutional position embedding, super token attention and convolutional MLP, each as a residual."""

    def __init__(
        self, dim: int, num_heads: int, cell: int, mlp_ratio: float, drop_path: float, init_values: float | None
    ):
        super().__init__()
        self.pos_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SuperTokenAttention(dim, num_heads, cell)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.ls1, self.ls2 = (LayerScale(dim, init_values) if init_values else nn.Identity() for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """(... d) -> (... d)"""
        x = x + convolve(self.pos_conv, x, places)
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), places)))
        return x + self.drop_path(self.ls2(self.mlp(batch_norm(self.norm2, x, places), places)))


class Downsample(nn.Module):
    """3 x 3 convolution of stride 2 followed by batch normalization, between two stages."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, 2, 1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """(... h w d) -> (... h/2 w/2 d')"""
        return batch_norm(self.norm, convolve(self.conv, x, places), places)


class SViT(nn.Module):
    """SViT, as a classifier and as an encoder for masked pre-training.

    One form serves all three uses: `forward` classifies, `encode_units` (for `MAE`) computes visible units only, and
    `encode_masked` (for `SimMIM`) computes mask tokens too. Both encoders end with the last stage. They leave out the
    tail, which belongs to the classifier: a new tail classifies better than one that was pre-trained with a decoder
    (benchmarks/cifar10_probe.md).

    There is no position table, so any input size runs. Maps are padded with zeros to whole cells, as in the paper's
    code.

    Args:
        img_size: usual input size in pixels. The network does not depend on it.
        patch_size: stride of the stem: 4, or 2 or 1 for small images. A mask unit is 8 x `patch_size` pixels wide.
        embed_dims: widths of the four stages.
        depths: numbers of blocks in the four stages.
        num_heads: numbers of attention heads in the four stages.
        init_values: initial LayerScale of the last two stages, or None for no LayerScale.
        tail_dim: width of the tail, a linear layer between the last stage and the pooling of the classifier.
        global_pool: 'avg' for the mean of all tokens, or '' to classify each token.
    """

    pretrained_cfg: dict[str, Any]
    global_pool: str
    output_fmt = "NHWC"
    num_prefix_tokens = 0

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 5, 9, 3),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratio: float = 4.0,
        init_values: float | None = None,
        tail_dim: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        super().__init__()
        if patch_size not in STEM_STRIDES:
            raise UserError(f"patch_size is {patch_size}, but SViT's stem has a stride of 4, 2 or 1: choose one.")
        for dim, heads in zip(embed_dims, num_heads, strict=True):
            if dim % heads or dim % 2:
                raise UserError(
                    f"embed_dims has {dim}, which is odd or not a multiple of its {heads} heads: change one of them."
                )
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.unit_size, self.depths = UNIT_TOKENS * patch_size, tuple(depths)
        self.token_dim, self.embed_dim = embed_dims[0], embed_dims[-1]
        self.out_dim, self.num_features, self.head_hidden_size = embed_dims[-1], tail_dim, tail_dim
        self.grad_checkpointing = False

        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stem = Stem(in_chans, embed_dims[0], patch_size)
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        for i, (dim, depth, heads, cell) in enumerate(zip(embed_dims, depths, num_heads, (8, 4, 1, 1), strict=True)):
            scale = init_values if cell == 1 else None
            blocks = (SuperTokenBlock(dim, heads, cell, mlp_ratio, next(rates), scale) for _ in range(depth))
            self.stages.append(nn.ModuleList(blocks))
            if i < 3:
                self.merges.append(Downsample(dim, embed_dims[i + 1]))
            self.feature_info.append({"num_chs": dim, "reduction": patch_size * 2**i, "module": f"stages.{i}"})
        self.tail: nn.Module = nn.Linear(embed_dims[-1], tail_dim)
        self.norm: nn.Module = nn.BatchNorm2d(tail_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():  # convolutions keep torch's initialization, because normalization follows them
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    # Forward ---------------------------------------------------------------------------------------------------------

    def run_stages(self, x: Tensor, places: Places, last: int = 3) -> list[Tensor]:
        """(... d) -> [(... d)], from the state after the stem to the outputs of the stages up to `last`"""
        outputs: list[Tensor] = []
        stages: Any = zip(range(last + 1), self.stages, strict=False)
        for i, stage in stages:
            x = self.merges[i - 1](x, places) if i else x
            for block in stage:
                recompute = self.grad_checkpointing and self.training
                x = checkpoint(block, x, places) if recompute else block(x, places)
            outputs.append(x)
        return outputs

    def embed(self, images: Tensor, places: Places) -> Tensor:
        """(b c H W) -> (b h w d), the map after the stem"""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.stem(rearrange(images, "b c h w -> b h w c"), places)

    def apply_tail(self, x: Tensor) -> Tensor:
        """(... d) -> (... tail_dim), from the last stage to the features of the classifier"""
        return F.silu(batch_norm(self.norm, self.tail(x), Places()))

    def freeze_tail(self) -> None:
        """Freeze the tail, which masked pre-training does not use. It keeps its initial weights for a classifier."""
        self.tail.requires_grad_(False)
        self.norm.requires_grad_(False)

    def encode_units(self, units: Tensor, index: Tensor, grid: Grids) -> Tensor:
        """(b v c p p) -> (b v out_dim): encode units at positions `index` (b v) of the grid (gh gw)

        Raises:
            UserError: there is one grid for each image, or a single token to normalize in training.
        """
        places = Places(index, one_grid(grid))
        x = self.stem(rearrange(units, "b v c p q -> b v p q c"), places)
        return rearrange(self.run_stages(x, places)[-1], "b v 1 1 d -> b v d")

    def encode_masked(self, images: Tensor, mask: UnitMask, token: Tensor) -> Tensor:
        """(b c H W) -> (b n out_dim): encode all units, with a mask token in place of the masked ones

        Args:
            images: images (b c H W). The pixels of masked units must be zero already, because the stem's convolutions
                cross the borders of units.
            mask: visible units (b v) and masked units (b m). Only visible units count in the statistics of
                normalization.
            token: mask token (token_dim), which replaces the masked tokens after the stem.
        """
        grid = unit_grid(images.shape[-2], images.shape[-1], self.unit_size)
        places = Places(mask.visible, grid, skip=False)
        x = replace_masked(self.embed(images, places), mask.masked, grid, token)
        return self.run_stages(x, places)[-1].flatten(1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """(b c H W) -> (b h w tail_dim), at stride 32"""
        return self.apply_tail(self.run_stages(self.embed(x, Places()), Places())[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(b h w d) -> (b classes), or (b d) with `pre_logits`"""
        x = self.head_drop(x.mean(dim=(1, 2)) if self.global_pool else x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(b c H W) -> (b classes)"""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """(b c H W) -> features (b h w tail_dim) and maps (b d h w) at strides 4, 8, 16 and 32, or the maps only

        This is timm's interface. `norm` has no effect, because no norm follows the stages. With `intermediates_only`
        the network stops after the last requested map.
        """
        if output_fmt != "NCHW":
            raise UserError(f"SViT returns maps as NCHW only, not {output_fmt!r}: pass output_fmt='NCHW'.")
        take, last = feature_take_indices(len(self.feature_info), indices)
        outputs = self.run_stages(self.embed(x, Places()), Places(), last if intermediates_only else 3)
        maps = [rearrange(outputs[i], "b h w d -> b d h w") for i in take]
        return maps if intermediates_only else (self.apply_tail(outputs[-1]), maps)

    # timm's other interfaces -----------------------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the selected maps do not need, and return the indices of these maps."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.stages, self.merges = self.stages[: last + 1], self.merges[:last]
        if prune_head:
            self.tail, self.norm = nn.Identity(), nn.Identity()
            self.reset_classifier(0)
        return take

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one. `global_pool` is 'avg', '' for a map, or None to keep the current one."""
        if global_pool not in (None, "avg", ""):
            raise UserError(f"SViT has no global_pool {global_pool!r}: choose 'avg', or '' for no pooling.")
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        weight = self.stem.convs[0].weight
        like: Any = {"device": weight.device, "dtype": weight.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations.

        As in timm's networks, running statistics are then updated twice with each batch.
        """
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the layers for timm's layer decay.

        Each block is a layer, a merge belongs to the block before it, and the tail belongs to the last layer.
        """
        merges = [(rf"^merges\.{i}\.", (i, self.depths[i] - 1)) for i in range(len(self.merges))]
        blocks = [*merges, (r"^stages\.(\d+)\.(\d+)", None), (r"^(?:tail|norm)\.", (99999,))]
        return {"stem": r"^stem", "blocks": r"^(?:stages|merges)\.(\d+)" if coarse else blocks}


# Sizes ---------------------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {
        f"svit_{size}": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": False,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.convs.0",
            "classifier": "head",
        }
        for size in ("nano", "s", "b", "l")
    }
)


def _svit(
    variant: str,
    pretrained: bool,
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    kwargs: dict[str, Any],
) -> SViT:
    build: Any = build_model_with_cfg
    return build(
        SViT,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **({"embed_dims": dims, "depths": depths, "num_heads": heads} | kwargs),
    )


@register_model
def svit_nano(pretrained: bool = False, **kwargs: Any) -> SViT:
    """Build an SViT for tests and demonstrations on a CPU. This size is not in the paper."""
    return _svit("svit_nano", pretrained, (32, 64, 128, 192), (1, 2, 4, 1), (1, 2, 4, 6), kwargs)


@register_model
def svit_s(pretrained: bool = False, **kwargs: Any) -> SViT:
    """Build SViT-S (paper, table 1)."""
    return _svit("svit_s", pretrained, (64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), kwargs)


@register_model
def svit_b(pretrained: bool = False, **kwargs: Any) -> SViT:
    """Build SViT-B (paper, table 1)."""
    return _svit("svit_b", pretrained, (96, 192, 384, 512), (4, 6, 14, 6), (2, 3, 6, 8), {"init_values": 1e-6} | kwargs)


@register_model
def svit_l(pretrained: bool = False, **kwargs: Any) -> SViT:
    """Build SViT-L (paper, table 1)."""
    return _svit(
        "svit_l", pretrained, (96, 192, 448, 640), (4, 7, 19, 8), (2, 3, 7, 10), {"init_values": 1e-6} | kwargs
    )
