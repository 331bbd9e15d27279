"""SViT: a vision transformer that attends among super tokens, and its masked pre-training with and without skipping.

Huang et al., "Vision Transformer with Super Token Sampling", CVPR 2023. Four stages of tokens at strides 4, 8, 16, 32.
In the first two, tokens are softly assigned to the super tokens around them, which attend to each other; in the last
two every token is its own super token, and this is ordinary attention. 3 x 3 convolutions in every block tell places.

Those convolutions cross mask units, so nothing can be skipped as freely as in HiViT. Here the state of the network is
the visible tokens alone. Where an association looks at neighbors, masked ones are zero, just as those beyond the
image's border are; where a convolution does, they are the mean of the image's visible tokens. With nothing masked this
is the ordinary network.
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
from mimkit.units import Grid, UnitMask, replace_masked, unit_grid

SIDE = 8  # tokens of the first stage along a side of a mask unit, which is one token of the last
STRIDES = {4: (2, 1, 2, 1), 2: (2, 1, 1, 1), 1: (1, 1, 1, 1)}  # of the stem's convolutions, by patch size


class Places(NamedTuple):
    """Which tokens a state holds: those of the whole map, (b h w d), or of k x k in each visible unit, (b v k k d)."""

    visible: Tensor | None = None  # (b v), places of units; None: all
    grid: Grid = (0, 0)  # of units
    skip: bool = True  # hold visible units only; else the whole map, of which they alone count in statistics

    def where(self) -> tuple[Any, ...]:
        """Index of visible units in a map seen as (b gh k gw k ...): it gives, or takes, (b v k k ...)"""
        assert self.visible is not None
        image = torch.arange(len(self.visible), device=self.visible.device)[:, None]
        return image, self.visible // self.grid[1], slice(None), self.visible % self.grid[1]

    def units(self, x: Tensor) -> Tensor:
        """Map (b h w ...) -> its visible units (b v k k ...)"""
        gh, gw = self.grid
        return x.unflatten(2, (gw, -1)).unflatten(1, (gh, -1))[self.where()]

    def to_map(self, x: Tensor, average: bool = False) -> Tensor:
        """State -> map (b h w ...); where nothing is visible it is zero, or the average of what is in the image"""
        if self.visible is None or not self.skip:
            return x
        (gh, gw), k = self.grid, x.shape[2]
        blank = wide(x).mean(dim=(1, 2, 3)).to(x.dtype) if average else x.new_zeros(x.shape[0], *x.shape[4:])
        blank = blank[:, None, None, None, None].expand(-1, gh, k, gw, k, *x.shape[4:]).clone()
        blank[self.where()] = x
        return blank.flatten(3, 4).flatten(1, 2)

    def to_state(self, x: Tensor) -> Tensor:
        """The inverse: what the map has at masked places is gone."""
        return x if self.visible is None or not self.skip else self.units(x)

    def counted(self, x: Tensor) -> Tensor:
        """State -> the part of it that counts in statistics"""
        return x if self.visible is None or self.skip else self.units(x)


# Parts that look at more than a token --------------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    """In float32 at least: sums, and what they divide, do not fit half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def convolve(conv: Any, x: Tensor, places: Places) -> Tensor:
    """A 3 x 3 convolution of a state: (... d) -> (... d'), half as wide and high if its stride is 2

    A masked neighbor counts as an average one. Zeros would make what comes out depend on how many neighbors there are
    more than on the image, as tokens share a large mean: trained so, the network is another one on whole images, whose
    features were 1.4 deviations away from those of masked ones (benchmarks/cifar10_probe.md).
    """
    x = conv(rearrange(places.to_map(x, average=True), "b h w d -> b d h w"))
    return places.to_state(rearrange(x, "b d h w -> b h w d"))


def batch_norm(norm: Any, x: Tensor, places: Places) -> Tensor:
    """Batch normalization of a state (... d), by the statistics of the tokens that count.

    Raises:
        UserError: one token alone, which would be divided by a deviation of 0.
    """
    counted = places.counted(x) if norm.training else x
    if norm.training and counted.numel() == counted.shape[-1]:
        raise UserError(
            "SViT normalizes by the visible tokens of a step's part in one process, and there is one: take a larger "
            "batch or image, fewer --grad-accum-steps, or a lower --mask-ratio."
        )
    if counted is x:
        # as one long image whose channels lie innermost, which is how kernels like it best
        return rearrange(norm(rearrange(x, "b ... d -> b d (...) 1")), "b d t 1 -> b t d").view(x.shape)
    counted = wide(counted).flatten(0, -2)
    var, mean = torch.var_mean(counted, dim=0, correction=0)
    with torch.no_grad():
        t = len(counted)
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_((var * (t / max(t - 1, 1))).to(norm.running_var.dtype), norm.momentum)
    scale = norm.weight * (var + norm.eps).rsqrt()
    return torch.addcmul(norm.bias - mean * scale, x, scale).to(x.dtype)


def neighbors(x: Tensor) -> Tensor:
    """(b h w d) -> (b h w 9 d): the 3 x 3 around each, zero beyond the border"""
    h, w = x.shape[1:3]
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    return torch.stack([x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], dim=3)


def to_neighbors(x: Tensor) -> Tensor:
    """(b h w 9 d) -> (b h w d): what each gets from the 3 x 3 around it, the adjoint of `neighbors`"""
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    parts = [F.pad(part, (0, 0, j, -j, i, -i)) for part, (i, j) in zip(x.unbind(3), shifts, strict=True)]
    return torch.stack(parts).sum(0)


class Attention(nn.Module):
    """Super token attention (paper, section 3.2); with cells of one token, ordinary attention.

    Args:
        cell: tokens along a side of the cell that a super token starts as the mean of.
    """

    def __init__(self, dim: int, num_heads: int, cell: int):
        super().__init__()
        self.num_heads, self.cell = num_heads, cell
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor) -> Tensor:
        """Multi-head self-attention among all tokens of an image: (b ... d) -> (b ... d)"""
        qkv = self.qkv(x.flatten(1, -2))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(out, "b h n d -> b n (h d)")).view(x.shape)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """State (... d) -> (... d)"""
        if self.cell == 1:
            return self.attend(x)
        (h, w), c = x.shape[-3:-1], self.cell
        if h % c or w % c:
            x = F.pad(x, (0, 0, 0, -w % c, 0, -h % c))
        cells = rearrange(x, "... (hh i) (ww j) d -> ... hh ww (i j) d", i=c, j=c)
        tokens = cells.mean(dim=-2)  # super tokens (... hh ww d)
        with torch.no_grad():
            logits = cells @ self.around(tokens * tokens.shape[-1] ** -0.5, places).mT
            association = logits.softmax(dim=-1).to(x.dtype)  # (... hh ww i*j 9)
            mass = self.back(wide(association).sum(-2)[..., None], places)
        tokens = (self.back(wide(association.mT @ cells), places) / (mass + 1e-12)).to(x.dtype)
        cells = association @ self.around(self.attend(tokens), places)
        return rearrange(cells, "... hh ww (i j) d -> ... (hh i) (ww j) d", i=c)[..., :h, :w, :]

    @staticmethod
    def around(tokens: Tensor, places: Places) -> Tensor:
        """(... hh ww d) -> (... hh ww 9 d): the super tokens around each, zero for those that are not there"""
        return places.to_state(neighbors(places.to_map(tokens)))

    @staticmethod
    def back(parts: Tensor, places: Places) -> Tensor:
        """(... hh ww 9 d) -> (... hh ww d): what super tokens get from the cells around them"""
        return places.to_state(to_neighbors(places.to_map(parts)))


# The network ---------------------------------------------------------------------------------------------------------


class Stem(nn.Module):
    """Four 3 x 3 convolutions, each followed by GELU and batch normalization; a token sees 19 x 19 pixels."""

    def __init__(self, in_chans: int, dim: int, patch_size: int):
        super().__init__()
        widths = (in_chans, dim // 2, dim // 2, dim, dim)
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1) for i, stride in enumerate(STRIDES[patch_size])
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """Pixels as a state (... c) -> (... d)"""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = batch_norm(norm, F.gelu(convolve(conv, x, places)), places)
        return x


class Mlp(nn.Module):
    """An MLP with a depthwise convolution on its hidden map, as a residual."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """(... d) -> (... d)"""
        x = F.gelu(self.fc1(x))
        return self.fc2(x + convolve(self.conv, x, places))


class Block(nn.Module):
    """Convolutional position, super token attention, convolutional MLP."""

    def __init__(
        self, dim: int, num_heads: int, cell: int, mlp_ratio: float, drop_path: float, init_values: float | None
    ):
        super().__init__()
        self.pos_conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, cell)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls1, self.ls2 = (LayerScale(dim, init_values) if init_values else nn.Identity() for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """(... d) -> (... d)"""
        x = x + convolve(self.pos_conv, x, places)
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), places)))
        return x + self.drop_path(self.ls2(self.mlp(batch_norm(self.norm2, x, places), places)))


class Merge(nn.Module):
    """A 3 x 3 convolution of stride 2, and batch normalization."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, 2, 1)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """(... d) -> (... d'), half as wide and high"""
        return batch_norm(self.norm, convolve(self.conv, x, places), places)


class SViT(nn.Module):
    """SViT, supervised and as both kinds of encoder for masked pre-training, in one form.

    It has no table of positions, so any input size runs; the map is padded to cells with zeros, as in the paper's code.
    `encode_units` (for `MAE`) computes visible units only, `encode_masked` (for `SimMIM`) mask tokens too. Both end
    with the last stage: the tail is the classifier's, and one that has served a decoder is worth less than a fresh one
    (benchmarks/cifar10_probe.md).

    Args:
        img_size: input in pixels; nothing depends on it.
        patch_size: stride of the stem: 4, or 2 or 1 for small images. A mask unit is 8 x `patch_size` pixels wide.
        embed_dims, depths, num_heads: of the four stages.
        init_values: start of LayerScale in the last two stages, which have none by default.
        tail_dim: channels after the last stage, of which the classifier sees the mean.
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
        if patch_size not in STRIDES:
            raise UserError(f"patch_size is {patch_size}: SViT's stem has a stride of 4, 2 or 1; choose one of them.")
        for dim, heads in zip(embed_dims, num_heads, strict=True):
            if dim % heads or dim % 2:
                raise UserError(f"embed_dims has {dim}, which is odd or no multiple of {heads} heads: change it.")
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.unit_size, self.depths = SIDE * patch_size, tuple(depths)
        self.token_dim, self.embed_dim = embed_dims[0], embed_dims[-1]
        self.out_dim, self.num_features, self.head_hidden_size = embed_dims[-1], tail_dim, tail_dim
        self.grad_checkpointing = False

        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stem = Stem(in_chans, embed_dims[0], patch_size)
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        for i, (dim, depth, heads, cell) in enumerate(zip(embed_dims, depths, num_heads, (8, 4, 1, 1), strict=True)):
            scale = init_values if cell == 1 else None
            blocks = (Block(dim, heads, cell, mlp_ratio, next(rates), scale) for _ in range(depth))
            self.stages.append(nn.ModuleList(blocks))
            if i < 3:
                self.merges.append(Merge(dim, embed_dims[i + 1]))
            self.feature_info.append({"num_chs": dim, "reduction": patch_size * 2**i, "module": f"stages.{i}"})
        self.tail: nn.Module = nn.Linear(embed_dims[-1], tail_dim)
        self.norm: nn.Module = nn.BatchNorm2d(tail_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():  # convolutions stay at torch's start: normalization follows them
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    # Forward ---------------------------------------------------------------------------------------------------------

    def run(self, x: Tensor, places: Places, last: int = 3) -> list[Tensor]:
        """State after the stem (... d) -> the states that stages end with, up to `last`"""
        outputs: list[Tensor] = []
        stages: Any = zip(range(last + 1), self.stages, strict=False)
        for i, stage in stages:
            x = self.merges[i - 1](x, places) if i else x
            for block in stage:
                again = self.grad_checkpointing and self.training
                x = checkpoint(block, x, places) if again else block(x, places)
            outputs.append(x)
        return outputs

    def embed(self, images: Tensor, places: Places) -> Tensor:
        """(b c H W) -> (b h w d)"""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.stem(rearrange(images, "b c h w -> b h w c"), places)

    def finish(self, x: Tensor) -> Tensor:
        """State of the last stage (... d) -> (... tail_dim)"""
        return F.silu(batch_norm(self.norm, self.tail(x), Places()))

    def freeze_tail(self) -> None:
        """For masked pre-training, which ends before it; it stays what a classifier starts from."""
        self.tail.requires_grad_(False)
        self.norm.requires_grad_(False)

    def encode_units(self, units: Tensor, index: Tensor, grid: Grid) -> Tensor:
        """Units (b v c p p) at places index (b v) of the grid (gh gw) -> latent (b v out_dim)"""
        places = Places(index, grid)
        x = self.stem(rearrange(units, "b v c p q -> b v p q c"), places)
        return rearrange(self.run(x, places)[-1], "b v 1 1 d -> b v d")

    def encode_masked(self, images: Tensor, mask: UnitMask, token: Tensor) -> Tensor:
        """Images (b c H W), places (b v) and (b m), mask token (token_dim) -> latent of all units (b n out_dim).

        Masked pixels must be zero already, as the stem looks across units. Mask tokens are left out of statistics.
        """
        grid = unit_grid(images.shape[-2], images.shape[-1], self.unit_size)
        places = Places(mask.visible, grid, skip=False)
        x = replace_masked(self.embed(images, places), mask.masked, grid, token)
        return self.run(x, places)[-1].flatten(1, 2)

    def forward_features(self, x: Tensor) -> Tensor:
        """(b c H W) -> (b h w tail_dim), at 1/32 of the size"""
        return self.finish(self.run(self.embed(x, Places()), Places())[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(b h w d) -> (b classes), or (b d) before the classifier"""
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
        """(b c H W) -> maps (b d h w) at strides 4, 8, 16, 32; before them (b h w tail_dim), unless maps only.

        timm's contract. No norm follows the stages, so `norm` changes nothing; maps only stop at the last one needed.
        """
        if output_fmt != "NCHW":
            raise UserError(f"SViT's maps come as NCHW, not {output_fmt!r}: pass output_fmt='NCHW'.")
        take, last = feature_take_indices(len(self.feature_info), indices)
        outputs = self.run(self.embed(x, Places()), Places(), last if intermediates_only else 3)
        maps = [rearrange(outputs[i], "b h w d -> b d h w") for i in take]
        return maps if intermediates_only else (self.finish(outputs[-1]), maps)

    # timm's other contracts ------------------------------------------------------------------------------------------

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen maps do not need; -> their indices."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.stages, self.merges = self.stages[: last + 1], self.merges[:last]
        if prune_head:
            self.tail, self.norm = nn.Identity(), nn.Identity()
            self.reset_classifier(0)
        return take

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head. global_pool: 'avg', or '' for a map."""
        if global_pool not in (None, "avg", ""):
            raise UserError(f"SViT pools by 'avg' or not at all (''), not by {global_pool!r}.")
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        weight = self.stem.convs[0].weight
        like: Any = {"device": weight.device, "dtype": weight.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass. Running statistics then see every batch twice, as timm's do."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer decay: every block is one, a merge is in that before it, the tail in the last."""
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
    """For tests and demonstrations on a CPU: ours, not the paper's."""
    return _svit("svit_nano", pretrained, (32, 64, 128, 192), (1, 2, 4, 1), (1, 2, 4, 6), kwargs)


@register_model
def svit_s(pretrained: bool = False, **kwargs: Any) -> SViT:
    """SViT-S (paper, table 1)."""
    return _svit("svit_s", pretrained, (64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), kwargs)


@register_model
def svit_b(pretrained: bool = False, **kwargs: Any) -> SViT:
    """SViT-B (paper, table 1)."""
    return _svit("svit_b", pretrained, (96, 192, 384, 512), (4, 6, 14, 6), (2, 3, 6, 8), {"init_values": 1e-6} | kwargs)


@register_model
def svit_l(pretrained: bool = False, **kwargs: Any) -> SViT:
    """SViT-L (paper, table 1)."""
    return _svit(
        "svit_l", pretrained, (96, 192, 448, 640), (4, 7, 19, 8), (2, 3, 7, 10), {"init_values": 1e-6} | kwargs
    )
