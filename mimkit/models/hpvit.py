"""HPViT: a hierarchical vision transformer made from the blocks of a pre-trained plain ViT.

The idea of arXiv 2211.01785: reduce the stride of a plain ViT's patch embedding from 16 to 4, and put 2 x 2 pools
between its blocks. This needs no new pre-training. Here, the hierarchical network moreover starts as an exact copy of
the plain ViT, its source (docs/converting.md):

1. The stride-4 map consists of 4 x 4 interleaved sub-grids. Each sub-grid is the token grid of the source on a shifted
   image. The sub-grids are folded into the batch, and the source's own code runs on them unchanged.
2. Each pool combines four tokens with learned weights, and starts by selecting one of them ("tap"): the token of the
   sub-grid that holds the source's own patches. After two pools, this sub-grid is the only one left.

The 1/16 map therefore starts as the source's map. Training moves the weights of the other taps, and thereby uses the
other sub-grids.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import timm
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from timm.layers import PatchEmbed, resample_abs_pos_embed, resample_abs_pos_embed_nhwc, to_2tuple
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._input import update_model_args
from timm.models.beit import Beit, gen_relative_position_index
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.models.layers.norm import set_eps
from mimkit.models.layers.windows import cut_windows, global_blocks, into_windows, out_of_windows, window_sides
from mimkit.units import Grid

PATCH, STRIDE = 16, 4
SIDE = PATCH // STRIDE  # sub-grids along a side of the stride-4 map
DEPTHS: dict[str, tuple[int | None, ...]] = {  # blocks in each stage; None stands for all remaining blocks
    "coarse": (0, 0, None, 0),
    "light": (0, 1, None, 0),
    "fine": (1, 1, None, 0),
    "even": (3, 3, None, 0),
    "swin": (2, 2, None, 2),
}
MAPS = {"subgrid": "b (h n) (w k) d", "local": "b (n h) (k w) d"}  # layout of n x k sub-grids or windows in the map


def resolve_depths(depths: str | Sequence[int], total: int) -> tuple[int, ...]:
    """Return the number of blocks in each of the four stages, `total` in all.

    Args:
        depths: name of a preset, a string such as '0-1-11-0', or four numbers.
        total: number of blocks of the source.

    Raises:
        UserError: the depths are not four numbers, or their sum is not `total`.
    """
    if isinstance(depths, str) and depths in DEPTHS:
        preset = DEPTHS[depths]
        numbers = tuple(total - sum(d or 0 for d in preset) if d is None else d for d in preset)
    else:
        words = depths.split("-") if isinstance(depths, str) else [str(d) for d in _as_list(depths)]
        numbers = tuple(int(word) for word in words if word.isdigit())
        numbers = numbers if len(numbers) == len(words) else ()
    if len(numbers) != 4 or sum(numbers) != total or min(numbers) < 0:
        raise UserError(
            f"depths {depths!r} do not split {total} blocks over four stages: give numbers such as "
            f"0-1-{total - 1}-0, or one of {', '.join(DEPTHS)}."
        )
    return numbers


def resolve_pool_init(pool_init: str | float) -> float:
    """Return the share of the aligned tap in a pool's initial weights. The rest is shared equally by all four taps.

    Args:
        pool_init: aligned (a share of 1), average (0), or a number from 0 to 1.
    """
    try:
        share = {"aligned": 1.0, "average": 0.0}.get(str(pool_init), pool_init)
        if 0 <= float(share) <= 1:
            return float(share)
    except ValueError:
        pass
    raise UserError(f"pool_init {pool_init!r} is unknown: give aligned, average, or a number from 0 to 1.")


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, Sequence) else [values]


def plain_vit(
    source: str, kernel: int | None = None, any_grid: bool = False, norm_eps: float | None = None, **options: Any
) -> Any:
    """Build a plain ViT of timm with random weights.

    Args:
        source: timm's name of the network. A tag is ignored.
        kernel: side of the patch-embedding kernel in pixels, or None for the network's own. The token grid stays.
        any_grid: resample positions for each input size, where timm supports it.
        norm_eps: epsilon of all norms, or None for timm's.
        options: further arguments for timm. None stands for timm's default.

    Raises:
        UserError: timm does not know the name, or the network is not a plain ViT with a patch embedding.
    """
    name = source.split(".")[0]
    options = {key: value for key, value in options.items() if value is not None}
    try:
        with torch.device("meta"):
            probe: Any = timm.create_model(name, **options)
        if not isinstance(probe, VisionTransformer | Eva | Beit | VisionTransformerSAM):
            kind = type(probe).__name__
            raise UserError(f"{source} is a {kind}, not a plain ViT: choose one such as vit_base_patch16_224.")
        if not isinstance(probe.patch_embed, PatchEmbed):
            kind = type(probe.patch_embed).__name__
            raise UserError(
                f"{source} embeds images by a {kind}, not by patches: choose one such as vit_base_patch16_224."
            )
        if kernel:
            options |= {"patch_size": kernel, "img_size": [side * kernel for side in probe.patch_embed.grid_size]}
        if any_grid and isinstance(probe, VisionTransformer | Eva):
            options["dynamic_img_size"] = True
        net: Any = timm.create_model(name, **options)
    except (RuntimeError, TypeError, AssertionError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source} cannot be built by timm ({reason}): check its name and options.") from error
    set_eps(net, norm_eps)
    return net


class Pool(nn.Module):
    """Learned 2 x 2 pool: a convolution of stride 2 that starts as a mixture of one tap and the mean.

    Args:
        dim: width of the tokens.
        kind: dw (depthwise convolution) or conv (dense convolution).
        share: share of the tap in the initial weights. The mean of the four tokens has the rest, 1 - share.
        tap: row and column of the tap.
    """

    def __init__(self, dim: int, kind: str, share: float, tap: tuple[int, int]):
        super().__init__()
        self.kind, self.share, self.tap = kind, share, tap
        self.weight = nn.Parameter(torch.empty(dim, 1 if kind == "dw" else dim, 2, 2))
        self.reset_parameters()

    def start(self) -> Tensor:
        """Return the initial weights."""
        taps = torch.full((2, 2), (1 - self.share) / 4)
        taps[self.tap] += self.share
        dim, inputs = self.weight.shape[:2]
        channels = torch.ones(dim, 1) if inputs == 1 else torch.eye(dim)
        return channels[..., None, None] * taps

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weights to their initial values."""
        self.weight.copy_(self.start())

    def forward(self, x: Tensor) -> Tensor:
        """(b 2h 2w d) -> (b h w d)"""
        device = x.device.type
        has_autocast = torch.amp.is_autocast_available(device)  # false on the meta device
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():  # keep the tokens' precision
            x = rearrange(x, "b h w d -> b d h w")
            x = F.conv2d(x, self.weight.to(x.dtype), stride=2, groups=x.shape[1] // self.weight.shape[1])
        return rearrange(x, "b d h w -> b h w d")


class MeanPool(nn.Module):
    """2 x 2 mean pool, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 2h 2w d) -> (b h w d)"""
        return reduce(x, "b (h p) (w q) d -> b h w d", "mean", p=2, q=2)


class HPViT(nn.Module):
    """A plain ViT of timm as a pyramid of maps at strides 4, 8, 16 and 32, all as wide as the ViT.

    Before training, the 1/16 map and the prefix tokens at the end of stage 3 equal those of the source (with its kernel
    resized to 16 px) after the same number of blocks. If stage 4 has no blocks, the source's final norm, pooling and
    head follow, so the logits are equal too, and the 1/32 map is the mean of the 1/16 map.

    Any input size runs. Images are padded at the right and bottom to a multiple of 16 px, and positions are resampled
    by the source's own method.

    The source's modules and parameters keep their names, so a state dict of the source fits except for `pools`.

    Args:
        source: name of the plain ViT in timm.
        source_args: arguments for the source that differ from timm's defaults; `norm_eps` too.
        depths: number of blocks in each stage: the name of a preset, a string such as '0-1-11-0', or four numbers.
        pool: dw (depthwise convolution), conv (dense convolution) or avg (mean, without parameters).
        pool_init: initial weights of the first two pools: aligned (select the source's own token), average, or a number
            from 0 to 1, the share of aligned in a mixture of both. A third pool starts as the average.
        attention: subgrid, or local for contiguous windows as large as the source's grid, for comparison.
        window: largest side, in tokens, of attention windows inside a sub-grid for large images, or 0 for none. The
            last block of each quarter stays global.
        padding: pixels of padding before and after the image on each axis: (4, 8), (8, 4) or (0, 12).
        prefix: keep or drop class and register tokens. The head then sees the mean of the other tokens in their place.
        img_size: usual input size, which is only recorded: the network takes any.
        options: further arguments for the source (in_chans, num_classes, drop_path_rate, ...).
    """

    source: Any
    blocks: nn.ModuleList
    patch_embed: Any
    pretrained_cfg: dict[str, Any]

    def __init__(
        self,
        source: str = "vit_base_patch16_224",
        source_args: dict[str, Any] | None = None,
        depths: str | Sequence[int] = "coarse",
        pool: str = "dw",
        pool_init: str | float = "aligned",
        attention: str = "subgrid",
        window: int = 0,
        padding: Sequence[int] = (4, 8),
        prefix: str = "keep",
        img_size: int | tuple[int, int] | None = None,
        **options: Any,
    ):
        super().__init__()
        for name, value, allowed in (
            ("pool", pool, ("dw", "conv", "avg")),
            ("attention", attention, tuple(MAPS)),
            ("prefix", prefix, ("keep", "drop")),
            ("padding", tuple(_as_list(padding)), ((4, 8), (8, 4), (0, 12))),
        ):
            if value not in allowed:
                raise UserError(f"{name} {value!r} is unknown: choose among {', '.join(map(str, allowed))}.")
        arguments = {**(source_args or {}), **options}
        if arguments.get("patch_drop_rate"):
            raise UserError(
                "patch_drop_rate drops tokens, and a pyramid needs all of them for its maps: leave it at 0."
            )
        net = plain_vit(source, PATCH, any_grid=True, **arguments)
        # The source and the pyramid share their modules and parameters, under the source's names
        self.__dict__["source"] = net
        for shared in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[shared] = net.__dict__[shared]

        self.sam, self.beit, self.eva = (isinstance(net, kind) for kind in (VisionTransformerSAM, Beit, Eva))
        self.grid: Grid = net.patch_embed.grid_size
        self.in_chans = net.patch_embed.proj.in_channels
        self.embed_dim, self.num_features = net.embed_dim, net.num_features
        self.num_prefix_tokens = 0 if prefix == "drop" else getattr(net, "num_prefix_tokens", 0)
        self.depths = resolve_depths(depths, len(net.blocks))
        self.attention, self.padding = attention, tuple(padding)
        rope = getattr(net, "rope", None)
        if self.depths[3] and rope is not None and hasattr(rope, "mrope_section"):
            raise UserError(
                f"{source} has MRoPE, which is undefined after the third pool: leave stage 4 without blocks."
            )
        self.min_rope_grid = 1 + _aliased_side(rope) if rope is not None and self.depths[3] else 0

        net.patch_embed.proj.stride, net.patch_embed.strict_img_size = (STRIDE, STRIDE), False
        for block in net.blocks:
            if self.eva:
                block.attn.num_prefix_tokens = self.num_prefix_tokens  # RoPE does not rotate them
            if self.beit:
                block.attn._get_rel_pos_bias = _no_bias  # the whole bias is passed as an argument, for any grid

        offset = self.padding[0] // STRIDE  # row and column of the sub-grid that holds the source's own patches
        share = resolve_pool_init(pool_init)
        taps = ((offset % 2, share), (offset // 2, share), (0, 0.0))
        learned = [pool != "avg" and (stage < 2 or self.depths[3] > 0) for stage in range(3)]
        self.pools = nn.ModuleList(
            Pool(self.embed_dim, pool, part, (tap, tap)) if learns else MeanPool()
            for (tap, part), learns in zip(taps, learned, strict=True)
        )
        self.pools.to(net.patch_embed.proj.weight)
        self.feature_info = []
        for stage, depth in enumerate(self.depths):
            # the module that computes the map: transformers needs a name of its own for each map
            before = f"pools.{stage - 1}" if stage else "patch_embed"
            module = f"blocks.{sum(self.depths[: stage + 1]) - 1}" if depth else before
            info = {"num_chs": self.embed_dim, "num_chs_norm": self.num_features, "reduction": 4 * 2**stage}
            self.feature_info.append({**info, "module": module})
        self._model_args = {  # all arguments: a saved config must not depend on today's defaults
            "source": source,
            "source_args": source_args or {},
            "depths": list(self.depths),
            "pool": pool,
            "pool_init": pool_init,
            "attention": attention,
            "padding": list(self.padding),
            "prefix": prefix,
        }
        self.set_window(window)

    def set_window(self, window: int) -> None:
        """Set the largest side, in tokens, of attention windows inside sub-grids; 0 disables windows."""
        if self.sam and (self.depths[3] or window or self.attention == "local"):
            source = self._model_args["source"]
            raise UserError(
                f"{source} has windows and decomposed relative positions of its own, which are not defined after the "
                "third pool, in other windows or for local attention: leave stage 4 without blocks, and leave window "
                "and attention at their defaults."
            )
        self.window, self.global_blocks = window, global_blocks(len(self.blocks), window)
        update_model_args(self, window=window)

    # Forward ---------------------------------------------------------------------------------------------------------

    def embed(self, x: Tensor) -> Tensor:
        """(b c H W) -> (b*16 gh gw d), the stride-4 map as sub-grids"""
        before, after = self.padding
        height, width = x.shape[-2:]
        x = F.pad(x, (before, after + -width % PATCH, before, after + -height % PATCH))
        x = rearrange(self.patch_embed.proj(x), "b d h w -> b h w d")
        x = rearrange(x, f"{MAPS[self.attention]} -> (b n k) h w d", n=SIDE, k=SIDE)
        return self.patch_embed.norm(x) if hasattr(self.patch_embed, "norm") else x

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(b gh gw d) -> (b k+n d) and RoPE: add positions and prefix tokens to sub-grids, as the source does"""
        net, rope = self.source, None
        if self.sam:
            if net.pos_embed is not None:
                x = x + resample_abs_pos_embed_nhwc(net.pos_embed, x.shape[1:3])
            x = net.norm_pre(net.pos_drop(x)).flatten(1, 2)
        elif self.beit:
            grid = x.shape[1:3]
            x = torch.cat([net.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], dim=1)
            if net.pos_embed is not None:
                x = x + resample_abs_pos_embed(net.pos_embed, list(grid), list(self.grid))
            x = net.pos_drop(x)
        elif self.eva:
            x, rope = net._pos_embed(x)
            x = net.norm_pre(x)
        else:
            x = net.norm_pre(net._pos_embed(x))
        return x[:, getattr(net, "num_prefix_tokens", 0) - self.num_prefix_tokens :], rope

    def position_arguments(
        self, i: int, x: Tensor, grid: Grid, rope: Tensor | None, sides: Grid | None, coarse: bool
    ) -> dict[str, Any]:
        """Return the arguments by which the source's block i receives positions: RoPE, or BEiT's relative bias.

        Args:
            i: index of the block.
            x: tokens (b k+n d) that the block receives.
            grid: 1/16 grid (gh gw).
            rope: RoPE of that grid, or None.
            sides: sides of the windows of the grid that the tokens are in, or None.
            coarse: whether the tokens are on the 1/32 grid.
        """
        if rope is not None:
            angles = rearrange(rope[i] if self.source.rope_mixed else rope, "... (h w) d -> ... h w d", h=grid[0])
            if sides:  # absolute positions of each window: prefix tokens are not rotated, so differences do not suffice
                angles = cut_windows(angles if self.source.rope_mixed else angles[None], sides)
                return {"rope": repeat(angles, "h m n d -> (b m) h n d", b=x.shape[0] // angles.shape[1])}
            angles = midpoints(angles) if coarse else angles
            return {"rope": rearrange(angles, "... h w d -> ... (h w) d")}
        if not self.beit:
            return {}
        owners: list[Any] = [self.source.rel_pos_bias, self.blocks[i].attn]  # a table of all blocks, or of this block
        tables = [owner.relative_position_bias_table for owner in owners if owner is not None]
        index = beit_relative_index(grid, sides or grid, 2 if coarse else 1, self.num_prefix_tokens, x.device)
        biases = [beit_relative_bias(table, self.grid, grid, index) for table in tables if table is not None]
        return {"shared_rel_pos_bias": sum(biases[1:], biases[0]).to(x.dtype) if biases else None}

    def run_block(self, i: int, x: Tensor, fine: Grid, rope: Tensor | None, coarse: Grid | None = None) -> Tensor:
        """(b k+n d) -> (b k+n d): run block i on the 1/16 grid `fine`, or on the 1/32 grid `coarse` if it is given"""
        grid, k = coarse or fine, self.num_prefix_tokens
        sides = grid if coarse or i in self.global_blocks else window_sides(grid, self.window)
        x, mask = into_windows(x, grid, sides, k)
        arguments = self.position_arguments(i, x, fine, rope, None if sides == grid else sides, coarse is not None)
        if mask is not None:
            bias = arguments.pop("shared_rel_pos_bias", None)
            arguments["shared_rel_pos_bias" if self.beit else "attn_mask"] = mask if bias is None else mask + bias
        x = rearrange(x, "b (h w) d -> b h w d", h=grid[0]) if self.sam else x
        if self.source.grad_checkpointing and self.training:
            x = checkpoint(self.blocks[i], x, **arguments)
        else:
            x = self.blocks[i](x, **arguments)
        return out_of_windows(x.flatten(1, 2) if self.sam else x, grid, sides, k)

    def split_prefix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b k+n d) -> (b k d), (b n d), prefix tokens and the others"""
        # one split has one gradient; two slices would have two of the size of x
        return x.split([self.num_prefix_tokens, x.shape[1] - self.num_prefix_tokens], dim=1)

    def merge(self, x: Tensor, stage: int, grid: Grid) -> tuple[Tensor, Grid]:
        """(b*side^2 k+n d) -> (b*(side/2)^2 k+n d) and the new grid: pool 2 x 2 at the end of a stage

        The first two pools combine four sub-grids into one. The third pool has a single sub-grid, and halves its grid.
        """
        pool, side = self.pools[stage], SIDE >> stage
        n = max(side // 2, 1)
        prefix, maps = self.split_prefix(x)
        maps = unfold(maps, side, grid, self.attention)
        odd = (0, maps.shape[2] % 2, 0, maps.shape[1] % 2)  # the 1/16 map only: sides of finer maps are even
        maps = pool(F.pad(maps, (0, 0, *odd)) if any(odd) else maps)
        if side > 1:
            prefix = pool(rearrange(prefix, "(b n k) t d -> (b t) n k d", n=side, k=side))
            prefix = rearrange(prefix, "(b t) n k d -> (b n k) t d", b=maps.shape[0])
        elif any(odd):  # exclude the padding from the mean
            valid = F.avg_pool2d(F.pad(x.new_ones(1, *grid), odd), 2)
            maps = maps / rearrange(valid, "1 h w -> h w 1")
        maps = rearrange(maps, f"{MAPS[self.attention]} -> (b n k) h w d", n=n, k=n)
        return torch.cat([prefix, maps.flatten(1, 2)], dim=1), (maps.shape[1], maps.shape[2])

    def stages(self, x: Tensor, last: int = 3) -> list[tuple[Tensor, Grid]]:
        """(b c H W) -> [(b*16 k+n d), (b*4 k+n d), (b k+n d), (b k+n' d)], each with the grid of a sub-grid

        These are the outputs of the stages up to `last`: sub-grids at strides 4 and 8, then maps at 16 and 32.
        """
        maps = self.embed(x)
        fine = grid = (maps.shape[1], maps.shape[2])
        if min(fine) < self.min_rope_grid:
            raise UserError(
                f"A grid of {fine[0]}x{fine[1]} is too small for RoPE after the third pool: give images of "
                f"{PATCH * self.min_rope_grid} px or more, or leave stage 4 without blocks."
            )
        x, rope = self.enter(maps)
        outputs = []
        for stage, depth in enumerate(self.depths[: min(last, len(self.pools)) + 1]):
            if stage:
                x, grid = self.merge(x, stage - 1, grid)
            first = sum(self.depths[:stage])
            for i in range(first, first + depth):
                x = self.run_block(i, x, fine, rope, coarse=grid if stage == 3 else None)
            outputs.append((x, grid))
        return outputs

    def leave(self, x: Tensor, grid: Grid) -> Tensor:
        """(b k+n d) -> the input of the source's head: apply the source's final norm, or its neck (SAM)"""
        if self.sam:
            return self.source.neck(rearrange(x, "b (h w) d -> b d h w", h=grid[0]))
        x = self.source.norm(x)
        dropped = self.source.num_prefix_tokens - self.num_prefix_tokens
        return torch.cat([x.mean(1, keepdim=True).expand(-1, dropped, -1), x], dim=1) if dropped else x

    def forward_features(self, x: Tensor) -> Tensor:
        """(b c H W) -> (b k+n d), the source's final tokens; for SAM (b d' h w), its final map"""
        return self.leave(*self.stages(x, 3 if self.depths[3] else 2)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(b k+n d) -> (b classes), or (b d) with `pre_logits`, by the source's head"""
        return self.source.forward_head(x, pre_logits=pre_logits)

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
        """(b c H W) -> final tokens (b k+n d) and maps (b d h w) at strides 4, 8, 16 and 32, or the maps only

        This is timm's interface. `norm` applies the source's final norm or neck to each map. Maps cover the padded
        image. With `intermediates_only` the network stops after the last requested map.
        """
        if output_fmt != "NCHW":
            raise UserError(f"HPViT returns maps as NCHW only, not {output_fmt!r}: pass output_fmt='NCHW'.")
        take, last = feature_take_indices(4, indices)
        outputs = self.stages(x, last if intermediates_only else 3)
        maps = []
        for i in take:
            tokens, grid = outputs[i]
            tokens = self.source.norm(tokens) if norm and not self.sam else tokens
            tokens = unfold(self.split_prefix(tokens)[1], max(SIDE >> i, 1), grid, self.attention)
            maps.append(rearrange(tokens, "b h w d -> b d h w"))
        if norm and self.sam:
            maps = [self.source.neck(m) for m in maps]
        if intermediates_only:
            return maps
        return self.leave(*outputs[min(3 if self.depths[3] else 2, len(outputs) - 1)]), maps

    # timm's other interfaces -----------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Return the number of classes of the source's head."""
        return self.source.num_classes

    @property
    def global_pool(self) -> str:
        """Return the pooling of the source's head."""
        return self.source.global_pool

    @property
    def head_hidden_size(self) -> int:
        """Return the width before the classifier."""
        return self.source.head_hidden_size

    def train(self, mode: bool = True) -> "HPViT":
        """Set the mode of the source too, which is not a child module."""
        self.source.training = mode
        return super().train(mode)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the selected maps do not need, and return the indices of these maps."""
        take, last = feature_take_indices(4, indices)
        self.depths = tuple(depth if stage <= last else 0 for stage, depth in enumerate(self.depths))
        self.source.blocks = self.blocks[: sum(self.depths)]
        self.pools = self.pools[:last]
        if prune_norm:
            for name in ("norm", "neck"):
                if hasattr(self.source, name):
                    setattr(self.source, name, nn.Identity())
        if prune_head:
            for name in ("fc_norm", "attn_pool"):
                if isinstance(getattr(self.source, name, None), nn.Module):
                    setattr(self.source, name, nn.Identity() if name == "fc_norm" else None)
            self.reset_classifier(0)
        return take

    def get_classifier(self) -> nn.Module:
        """Return the source's classifier."""
        return self.source.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one of the source's kind."""
        self.source.reset_classifier(num_classes, global_pool)
        kept = {key: value for key, value in self.source._model_args.items() if key in ("fc_norm", "use_fc_norm")}
        update_model_args(self, **kept)  # another pooling may move the final norm, which timm records here

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.source.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay: the source's, and the pools' weights."""
        return self.source.no_weight_decay() | {f"pools.{i}.weight" for i in range(len(self.pools))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the layers for timm's layer decay: those of the source, with a pool in the layer of the next block."""
        matcher = dict(self.source.group_matcher(coarse))
        first = [min(sum(self.depths[: stage + 1]), sum(self.depths) - 1) for stage in range(3)]
        pools = [(rf"^pools\.{i}\.", (block,)) for i, block in enumerate(first)]
        blocks = matcher["blocks"]
        return matcher | {"blocks": [*pools, *(blocks if isinstance(blocks, list) else [(blocks, None)])]}


# Positions on other grids --------------------------------------------------------------------------------------------


def unfold(x: Tensor, side: int, grid: Grid, attention: str) -> Tensor:
    """Assemble the map of side x side sub-grids: (b*side*side n d) -> (b h w d)."""
    return rearrange(x, f"(b n k) (h w) d -> {MAPS[attention]}", n=side, k=side, h=grid[0])


def midpoints(angles: Tensor) -> Tensor:
    """Interpolate RoPE for pooled tokens: sines and cosines at 0, 1, 2, ... -> at 0.5, 2.5, ... on both axes.

    (... h w d) -> (... h/2 w/2 d). The rotation midway between two rotations is their sum, scaled to length 1. This is
    exact if neighbors are less than pi apart, as they are except on small grids (`_aliased_side`). A last row or column
    without a neighbor keeps its own rotation.
    """
    h, w = angles.shape[-3:-1]
    flat = rearrange(angles, "... h w d -> (...) d h w")
    sums = F.avg_pool2d(F.pad(flat, (0, w % 2, 0, h % 2)), 2)
    sin, cos = sums.chunk(2, dim=1)
    length = torch.linalg.vector_norm(torch.stack([sin, cos]), dim=0).clamp_min(1e-12)
    result = torch.cat([sin / length, cos / length], dim=1)
    return rearrange(result, "b d h w -> b h w d").reshape(*angles.shape[:-3], *result.shape[-2:], angles.shape[-1])


@lru_cache(maxsize=32)
def beit_relative_index(grid: Grid, part: Grid, step: int, prefix: int, device: torch.device) -> Tensor:
    """Return the rows of BEiT's table for all pairs (n n) of tokens.

    Args:
        grid: grid (gh gw) of the table.
        part: the tokens lie in the first rows and columns of the grid, as many as given here.
        step: distance of neighboring tokens on the grid: 2 after the third pool.
        prefix: number of prefix tokens, 1 or 0.
        device: device of the result.
    """
    places = 1 + torch.arange(grid[0] * grid[1]).view(grid)[: part[0] : step, : part[1] : step].flatten()
    chosen = torch.cat([torch.arange(prefix), places])
    return gen_relative_position_index(grid)[chosen][:, chosen].to(device)


def beit_relative_bias(table: Tensor, old: Grid, new: Grid, index: Tensor) -> Tensor:
    """Resample BEiT's table (rows h) from the grid `old` to `new`, and return the bias (1 h n n) for an index (n n)."""
    rows = (2 * new[0] - 1) * (2 * new[1] - 1) + 3
    table = resize_rel_pos_bias_table(table, new, (rows, table.shape[1]), old_window_size=old)
    return rearrange(table[index], "n k h -> 1 h n k")


def _aliased_side(rope: Any) -> int:
    """Return the largest side of a grid on which neighbors are pi or more apart in the fastest band of a RoPE."""
    if hasattr(rope, "periods"):  # DINOv3: coordinates run from -1 to 1
        return int(4 / (rope.min_period or 1.0))  # not from `periods`, which has no values on the meta device
    return int(max(rope.ref_feat_shape) / math.pi) if getattr(rope, "ref_feat_shape", None) else 0


def _no_bias() -> float:
    return 0.0


# Sizes ---------------------------------------------------------------------------------------------------------------

NAMED = {  # width, blocks, heads and default source
    "hpvit_s": (384, 12, 6, "vit_small_patch16_224"),
    "hpvit_b": (768, 12, 12, "vit_base_patch16_224"),
    "hpvit_l": (1024, 24, 16, "vit_large_patch16_224"),
    "hpvit_h": (1280, 32, 16, "vit_huge_patch14_224"),
}

default_cfgs = generate_default_cfgs(  # without input size and classes: timm would override the source's with them
    {
        name: {"url": "", "input_size": None, "num_classes": -1, "first_conv": "patch_embed.proj", "classifier": "head"}
        for name in ("hpvit", *NAMED)
    }
)


def shape_of(net: Any) -> tuple[int, int, int]:
    """Return the width, the number of blocks and the number of heads of a plain ViT."""
    heads = next(module.num_heads for module in net.blocks[0].modules() if hasattr(module, "num_heads"))
    return net.embed_dim, len(net.blocks), heads


def name_for(net: Any) -> str:
    """Return the name of the HPViT with a plain ViT's width, blocks and heads, or 'hpvit' if there is none."""
    return next((name for name, (*shape, _) in NAMED.items() if tuple(shape) == shape_of(net)), "hpvit")


def _describe(net: HPViT, source: str) -> dict[str, Any]:
    """Return the `pretrained_cfg` of a pyramid, with the mean, std, interpolation and crop of its source."""
    config = get_pretrained_cfg(source, allow_unregistered=True)
    kept = ("interpolation", "crop_pct", "crop_mode", "mean", "std", *(["license"] if "." in source else []))
    heads = {"VisionTransformerDistilled": ("head", "head_dist"), "VisionTransformerSAM": "head.fc"}
    return {key: getattr(config, key) for key in kept if config and getattr(config, key) is not None} | {
        "input_size": (net.in_chans, *(PATCH * side for side in net.grid)),
        "num_classes": net.num_classes,
        "classifier": heads.get(type(net.source).__name__, "head"),
    }


def _hpvit(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> HPViT:
    *shape, default = NAMED.get(variant, ("vit_base_patch16_224",))
    needs_cfg = not kwargs.get("pretrained_cfg")

    def pyramid(**options: Any) -> HPViT:
        net = HPViT(**{"source": default, **options})
        if shape and tuple(shape) != shape_of(net):
            width, blocks, heads = shape_of(net)
            raise UserError(
                f"{variant} has a width of {shape[0]}, {shape[1]} blocks and {shape[2]} heads, but its source has a "
                f"width of {width}, {blocks} blocks and {heads} heads: choose {name_for(net)}."
            )
        return net

    build: Any = build_model_with_cfg
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    net = build(pyramid, variant, pretrained, feature_cfg=feature_cfg, **kwargs)
    model: Any = net.model if isinstance(net, FeatureGetterNet) else net
    if needs_cfg:
        net.pretrained_cfg.update(_describe(model, model._model_args["source"]))
    if kwargs.get("img_size"):
        net.pretrained_cfg["input_size"] = (model.in_chans, *to_2tuple(kwargs["img_size"]))
    return net


@register_model
def hpvit(pretrained: bool = False, **kwargs: Any) -> HPViT:
    """Build an HPViT from any plain ViT of timm."""
    return _hpvit("hpvit", pretrained, kwargs)


@register_model
def hpvit_s(pretrained: bool = False, **kwargs: Any) -> HPViT:
    """Build an HPViT from a plain ViT-S."""
    return _hpvit("hpvit_s", pretrained, kwargs)


@register_model
def hpvit_b(pretrained: bool = False, **kwargs: Any) -> HPViT:
    """Build an HPViT from a plain ViT-B."""
    return _hpvit("hpvit_b", pretrained, kwargs)


@register_model
def hpvit_l(pretrained: bool = False, **kwargs: Any) -> HPViT:
    """Build an HPViT from a plain ViT-L."""
    return _hpvit("hpvit_l", pretrained, kwargs)


@register_model
def hpvit_h(pretrained: bool = False, **kwargs: Any) -> HPViT:
    """Build an HPViT from a plain ViT-H."""
    return _hpvit("hpvit_h", pretrained, kwargs)
