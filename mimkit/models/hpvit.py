"""HPViT: a plain ViT's own blocks, run as a pyramid.

After arXiv 2211.01785, no new pre-training: the embedding's stride goes from 16 to 4, and 2 x 2 pools stand between the
blocks. Here it starts as the plain ViT exactly (docs/converting.md). The stride-4 map is 4 x 4 interleaved sub-grids,
each of them the token grid of the plain ViT on a shifted image. They are folded into the batch, where the source's own
code runs on them unchanged, and each pool starts as one tap, on the sub-grid that holds the source's own patches.
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
from mimkit.models.layers.windows import cut, global_blocks, into_windows, out_of_windows, window_sides
from mimkit.units import Grid

PATCH, STRIDE = 16, 4
SIDE = PATCH // STRIDE  # sub-grids along a side of the stride-4 map
DEPTHS: dict[str, tuple[int | None, ...]] = {  # blocks in each stage; None: all the others
    "coarse": (0, 0, None, 0),
    "light": (0, 1, None, 0),
    "fine": (1, 1, None, 0),
    "even": (3, 3, None, 0),
    "swin": (2, 2, None, 2),
}
MAPS = {"subgrid": "b (h n) (w k) d", "local": "b (n h) (k w) d"}  # how n x k pieces lie in the map


def resolve_depths(depths: str | Sequence[int], total: int) -> tuple[int, ...]:
    """A preset's name, '0-1-11-0' or four numbers -> blocks in each of the four stages, `total` in all."""
    if isinstance(depths, str) and depths in DEPTHS:
        given = DEPTHS[depths]
        found = tuple(total - sum(d or 0 for d in given) if d is None else d for d in given)
    else:
        words = depths.split("-") if isinstance(depths, str) else [str(d) for d in _listed(depths)]
        found = tuple(int(word) for word in words if word.isdigit())
        found = found if len(found) == len(words) else ()
    if len(found) != 4 or sum(found) != total or min(found) < 0:
        raise UserError(
            f"depths {depths!r} do not split {total} blocks over four stages: give numbers such as "
            f"0-1-{total - 1}-0, or one of {', '.join(DEPTHS)}."
        )
    return found


def resolve_share(pool_init: str | float) -> float:
    """aligned, average or a number -> how much of a pool's start is one tap, the rest being the mean."""
    try:
        share = {"aligned": 1.0, "average": 0.0}.get(str(pool_init), pool_init)
        if 0 <= float(share) <= 1:
            return float(share)
    except ValueError:
        pass
    raise UserError(f"pool_init {pool_init!r} is unknown: give aligned, average, or a share from 0 to 1.")


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, Sequence) else [values]


def plain_vit(
    source: str, kernel: int | None = None, any_grid: bool = False, norm_eps: float | None = None, **options: Any
) -> Any:
    """A plain ViT of timm, without weights.

    Args:
        source: its name in timm; a tag is ignored.
        kernel: side of its kernel in pixels, if it isn't to be its own; the token grid stays.
        any_grid: whether its positions follow the input, where timm has that.
        norm_eps: of all its norms, where it is not timm's.
        options: timm's own.
    """
    name = source.split(".")[0]
    options = {key: value for key, value in options.items() if value is not None}
    try:
        with torch.device("meta"):
            probe: Any = timm.create_model(name, **options)
        if not isinstance(probe, VisionTransformer | Eva | Beit | VisionTransformerSAM):
            raise UserError(f"{source} is a {type(probe).__name__}, not a plain ViT: try vit_base_patch16_224.")
        if not isinstance(probe.patch_embed, PatchEmbed):
            raise UserError(f"{source} embeds by a {type(probe.patch_embed).__name__}, not by patches: choose another.")
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


def set_eps(net: Any, eps: float | None) -> None:
    """Of all norms of a network, if one is given: timm's arguments have no word for it."""
    for module in net.modules() if eps is not None else ():
        if hasattr(module, "eps"):
            module.eps = eps


class Pool(nn.Module):
    """Four neighboring tokens become one, by weights that start at `share` of one tap and 1 - share of the mean.

    Args:
        kind: dw (a weight for each channel) or conv (dense).
        tap: row and column of that token.
    """

    def __init__(self, dim: int, kind: str, share: float, tap: tuple[int, int]):
        super().__init__()
        self.kind, self.share, self.tap = kind, share, tap
        self.weight = nn.Parameter(torch.empty(dim, 1 if kind == "dw" else dim, 2, 2))
        self.reset_parameters()

    def start(self) -> Tensor:
        """The weights that it starts with."""
        taps = torch.full((2, 2), (1 - self.share) / 4)
        taps[self.tap] += self.share
        dim, inputs = self.weight.shape[:2]
        channels = torch.ones(dim, 1) if inputs == 1 else torch.eye(dim)
        return channels[..., None, None] * taps

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew."""
        self.weight.copy_(self.start())

    def forward(self, x: Tensor) -> Tensor:
        """(b 2h 2w d) -> (b h w d)"""
        kind = x.device.type
        casts = torch.amp.is_autocast_available(kind)  # as it is but on meta devices
        with torch.autocast(kind, enabled=False) if casts else nullcontext():  # tokens keep the source's precision
            x = rearrange(x, "b h w d -> b d h w")
            x = F.conv2d(x, self.weight.to(x.dtype), stride=2, groups=x.shape[1] // self.weight.shape[1])
        return rearrange(x, "b d h w -> b h w d")


class Mean(nn.Module):
    """Four neighboring tokens become their mean."""

    def forward(self, x: Tensor) -> Tensor:
        """(b 2h 2w d) -> (b h w d)"""
        return reduce(x, "b (h p) (w q) d -> b h w d", "mean", p=2, q=2)


class HPViT(nn.Module):
    """A plain ViT of timm as a pyramid with maps at 1/4, 1/8, 1/16 and 1/32 of the input, all of the ViT's width.

    At the start the 1/16 map and the prefix tokens at the end of stage 3 are the plain ViT's (its kernel at 16) after
    as many blocks. With no block in stage 4 its final norm, pooling and head follow, so its logits are kept too, and
    the 1/32 map is the mean of the 1/16 map. Any input size: images are padded at the right and bottom to a multiple
    of 16 px, and positions follow the source's own resize.

    Args:
        source: name of the plain ViT in timm. Its parts stand here under their own names.
        source_args: what it is built with, where it is not timm's default; also `norm_eps`.
        depths: blocks in each stage; a preset's name, '0-1-11-0', or four numbers.
        pool: dw (depthwise convolution), conv (dense) or avg (mean, without parameters).
        pool_init: what the first two pools start as: aligned (one tap, on the source's own token), average, or the
            share of the tap in between. A pool into a stage 4 that has blocks starts as the average.
        attention: subgrid, or local: contiguous windows of the source's grid, for comparison.
        window: largest side of windows inside a sub-grid, for large images; the last block of each quarter is global.
        padding: pixels before and after the image on each axis, (4, 8), (8, 4) or (0, 12).
        prefix: keep or drop class and register tokens; the mean of the others then stands for them at the head.
        img_size: the usual input, recorded only: the network takes any.
        options: timm's own, for the source (in_chans, num_classes, drop_path_rate, ...).
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
            ("padding", tuple(_listed(padding)), ((4, 8), (8, 4), (0, 12))),
        ):
            if value not in allowed:
                raise UserError(f"{name} {value!r} is unknown: choose among {', '.join(map(str, allowed))}.")
        arguments = {**(source_args or {}), **options}
        if arguments.get("patch_drop_rate"):
            raise UserError("patch_drop_rate drops tokens that a pyramid needs for its maps: leave it at 0.")
        net = plain_vit(source, PATCH, any_grid=True, **arguments)
        # Source and pyramid are two views of the same parameters: both see them under the source's own names
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
            raise UserError(f"{source} has MRoPE, which is not defined after the third pool: leave stage 4 empty.")
        self.finest = 1 + _aliased(rope) if rope is not None and self.depths[3] else 0

        net.patch_embed.proj.stride, net.patch_embed.strict_img_size = (STRIDE, STRIDE), False
        for block in net.blocks:
            if self.eva:
                block.attn.num_prefix_tokens = self.num_prefix_tokens  # they are not rotated
            if self.beit:
                block.attn._get_rel_pos_bias = _no_bias  # all of the bias comes in an argument, for any grid

        offset = self.padding[0] // STRIDE  # of the sub-grid with the source's own patches
        share = resolve_share(pool_init)
        taps = ((offset % 2, share), (offset // 2, share), (0, 0.0))
        learned = [pool != "avg" and (stage < 2 or self.depths[3] > 0) for stage in range(3)]
        self.pools = nn.ModuleList(
            Pool(self.embed_dim, pool, part, (tap, tap)) if learns else Mean()
            for (tap, part), learns in zip(taps, learned, strict=True)
        )
        self.pools.to(net.patch_embed.proj.weight)
        self.feature_info = []
        for stage in range(4):
            last = max(sum(self.depths[: stage + 1]) - 1, 0)
            info = {"num_chs": self.embed_dim, "num_chs_norm": self.num_features, "reduction": 4 * 2**stage}
            self.feature_info.append({**info, "module": f"blocks.{last}"})
        self._model_args = {  # all of them: a file outlives the defaults that it was written with
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
        """Windows inside sub-grids of at most so many tokens a side; 0 for none."""
        if self.sam and (self.depths[3] or window or self.attention == "local"):
            source = self._model_args["source"]
            raise UserError(
                f"{source} has windows with decomposed relative positions of its own, which are not defined for blocks "
                "after the third pool, for other windows or for local attention: leave stage 4, window and attention."
            )
        self.window, self.global_blocks = window, global_blocks(len(self.blocks), window)
        update_model_args(self, window=window)

    # Forward ---------------------------------------------------------------------------------------------------------

    def embed(self, x: Tensor) -> Tensor:
        """(b c H W) -> the map at stride 4 as sub-grids (b*16 gh gw d)"""
        before, after = self.padding
        height, width = x.shape[-2:]
        x = F.pad(x, (before, after + -width % PATCH, before, after + -height % PATCH))
        x = rearrange(self.patch_embed.proj(x), "b d h w -> b h w d")
        x = rearrange(x, f"{MAPS[self.attention]} -> (b n k) h w d", n=SIDE, k=SIDE)
        return self.patch_embed.norm(x) if hasattr(self.patch_embed, "norm") else x

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Sub-grids (b gh gw d) -> what the source's first block takes, as tokens (b k+n d), and its RoPE"""
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

    def arguments(self, i: int, x: Tensor, grid: Grid, rope: Tensor | None, sides: Grid | None, coarse: bool) -> dict:
        """Where the tokens x of block i are, in the source's terms: on the 1/16 grid, in windows of it, or on the grid
        pooled by 2."""
        if rope is not None:
            angles = rearrange(rope[i] if self.source.rope_mixed else rope, "... (h w) d -> ... h w d", h=grid[0])
            if sides:  # every window at its own place: prefix tokens are not rotated, so differences are not enough
                angles = cut(angles if self.source.rope_mixed else angles[None], sides)
                return {"rope": repeat(angles, "h m n d -> (b m) h n d", b=x.shape[0] // angles.shape[1])}
            angles = midpoints(angles) if coarse else angles
            return {"rope": rearrange(angles, "... h w d -> ... (h w) d")}
        if not self.beit:
            return {}
        owners: list[Any] = [self.source.rel_pos_bias, self.blocks[i].attn]  # shared by all blocks, or of this one
        tables = [owner.relative_position_bias_table for owner in owners if owner is not None]
        index = relative_index(grid, sides or grid, 2 if coarse else 1, self.num_prefix_tokens, x.device)
        found = [relative_bias(table, self.grid, grid, index) for table in tables if table is not None]
        return {"shared_rel_pos_bias": sum(found[1:], found[0]).to(x.dtype) if found else None}

    def block(self, i: int, x: Tensor, fine: Grid, rope: Tensor | None, coarse: Grid | None = None) -> Tensor:
        """Tokens (b k+n d) on the 1/16 grid, or on a coarse one after the third pool -> the same, after block i"""
        grid, k = coarse or fine, self.num_prefix_tokens
        sides = grid if coarse or i in self.global_blocks else window_sides(grid, self.window)
        x, mask = into_windows(x, grid, sides, k)
        arguments = self.arguments(i, x, fine, rope, None if sides == grid else sides, coarse is not None)
        if mask is not None:
            bias = arguments.pop("shared_rel_pos_bias", None)
            arguments["shared_rel_pos_bias" if self.beit else "attn_mask"] = mask if bias is None else mask + bias
        x = rearrange(x, "b (h w) d -> b h w d", h=grid[0]) if self.sam else x
        if self.source.grad_checkpointing and self.training:
            x = checkpoint(self.blocks[i], x, **arguments)
        else:
            x = self.blocks[i](x, **arguments)
        return out_of_windows(x.flatten(1, 2) if self.sam else x, grid, sides, k)

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (b k+n d) -> (b k d), (b n d): by one split: each slice would have a gradient of all tokens"""
        return x.split([self.num_prefix_tokens, x.shape[1] - self.num_prefix_tokens], dim=1)

    def merge(self, x: Tensor, stage: int, grid: Grid) -> tuple[Tensor, Grid]:
        """Tokens (b*sides^2 k+n d) at the end of a stage -> pooled 2x2 into a quarter of the sub-grids, or the last of
        them into a coarser one; the new grid"""
        pool, side = self.pools[stage], SIDE >> stage
        n = max(side // 2, 1)
        prefix, maps = self.apart(x)
        maps = unfold(maps, side, grid, self.attention)
        odd = (0, maps.shape[2] % 2, 0, maps.shape[1] % 2)  # only ever at 1/16: the finer maps are multiples of 4
        maps = pool(F.pad(maps, (0, 0, *odd)) if any(odd) else maps)
        if side > 1:
            prefix = pool(rearrange(prefix, "(b n k) t d -> (b t) n k d", n=side, k=side))
            prefix = rearrange(prefix, "(b t) n k d -> (b n k) t d", b=maps.shape[0])
        elif any(odd):  # the mean is over the tokens that there are
            valid = F.avg_pool2d(F.pad(x.new_ones(1, *grid), odd), 2)
            maps = maps / rearrange(valid, "1 h w -> h w 1")
        maps = rearrange(maps, f"{MAPS[self.attention]} -> (b n k) h w d", n=n, k=n)
        return torch.cat([prefix, maps.flatten(1, 2)], dim=1), (maps.shape[1], maps.shape[2])

    def stages(self, x: Tensor, last: int = 3) -> list[tuple[Tensor, Grid]]:
        """(b c H W) -> tokens at the end of each stage up to `last` and the grid they are on:
        sub-grids (b*16 k+n d), (b*4 k+n d), then (b k+n d) at 1/16 and at 1/32"""
        maps = self.embed(x)
        fine = grid = (maps.shape[1], maps.shape[2])
        if min(fine) < self.finest:
            raise UserError(
                f"A grid of {fine[0]}x{fine[1]} is too small for RoPE after the third pool: give images of "
                f"{PATCH * self.finest} px or more, or leave stage 4 empty."
            )
        x, rope = self.enter(maps)
        outputs = []
        for stage, depth in enumerate(self.depths[: min(last, len(self.pools)) + 1]):
            if stage:
                x, grid = self.merge(x, stage - 1, grid)
            first = sum(self.depths[:stage])
            for i in range(first, first + depth):
                x = self.block(i, x, fine, rope, coarse=grid if stage == 3 else None)
            outputs.append((x, grid))
        return outputs

    def leave(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens of the last block -> what the source's head takes: after its own final norm or neck"""
        if self.sam:
            return self.source.neck(rearrange(x, "b (h w) d -> b d h w", h=grid[0]))
        x = self.source.norm(x)
        dropped = self.source.num_prefix_tokens - self.num_prefix_tokens
        return torch.cat([x.mean(1, keepdim=True).expand(-1, dropped, -1), x], dim=1) if dropped else x

    def forward_features(self, x: Tensor) -> Tensor:
        """(b c H W) -> the source's final tokens (b k+n d), or its final map (SAM)"""
        return self.leave(*self.stages(x, 3 if self.depths[3] else 2)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Final tokens -> (b classes), or (b d) before the classifier, by the source's own head"""
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
        """(b c H W) -> maps (b d h w) at 1/4, 1/8, 1/16, 1/32; before them the final tokens, unless maps only.

        timm's contract. `norm` applies the source's final norm or neck to each map. Maps are of the padded image.
        """
        if output_fmt != "NCHW":
            raise UserError(f"HPViT's maps come as NCHW, not {output_fmt!r}: pass output_fmt='NCHW'.")
        take, last = feature_take_indices(4, indices)
        outputs = self.stages(x, last if intermediates_only else 3)
        maps = []
        for i in take:
            tokens, grid = outputs[i]
            tokens = self.source.norm(tokens) if norm and not self.sam else tokens
            tokens = unfold(self.apart(tokens)[1], max(SIDE >> i, 1), grid, self.attention)
            maps.append(rearrange(tokens, "b h w d -> b d h w"))
        if norm and self.sam:
            maps = [self.source.neck(m) for m in maps]
        if intermediates_only:
            return maps
        return self.leave(*outputs[min(3 if self.depths[3] else 2, len(outputs) - 1)]), maps

    # timm's other contracts ------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Of the source's head."""
        return self.source.num_classes

    @property
    def global_pool(self) -> str:
        """Of the source's head."""
        return self.source.global_pool

    @property
    def head_hidden_size(self) -> int:
        """Width before the classifier."""
        return self.source.head_hidden_size

    def train(self, mode: bool = True) -> "HPViT":
        """The source is no child of the pyramid, but has its mode."""
        self.source.training = mode
        return super().train(mode)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen maps do not need; -> their indices."""
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
        """The source's."""
        return self.source.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head of the source's kind."""
        self.source.reset_classifier(num_classes, global_pool)
        kept = {key: value for key, value in self.source._model_args.items() if key in ("fc_norm", "use_fc_norm")}
        update_model_args(self, **kept)  # timm's own record of where the norm stays

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.source.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The source's, and the pools' weights."""
        return self.source.no_weight_decay() | {f"pools.{i}.weight" for i in range(len(self.pools))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer decay: the source's; a pool belongs to the block after it."""
        matcher = dict(self.source.group_matcher(coarse))
        first = [min(sum(self.depths[: stage + 1]), sum(self.depths) - 1) for stage in range(3)]
        pools = [(rf"^pools\.{i}\.", (block,)) for i, block in enumerate(first)]
        blocks = matcher["blocks"]
        return matcher | {"blocks": [*pools, *(blocks if isinstance(blocks, list) else [(blocks, None)])]}


# Positions of another grid -------------------------------------------------------------------------------------------


def unfold(x: Tensor, side: int, grid: Grid, attention: str) -> Tensor:
    """Tokens of sub-grids (b*side*side n d) -> their map (b h w d)"""
    return rearrange(x, f"(b n k) (h w) d -> {MAPS[attention]}", n=side, k=side, h=grid[0])


def midpoints(angles: Tensor) -> Tensor:
    """RoPE's sines and cosines (... h w d) at 0, 1, 2, ... -> the same at .5, 2.5, ... on both axes.

    The rotation midway between two is their sum, scaled back to length 1: exact while neighbors are less than pi
    apart, as they are but on small grids (`_aliased`). At an odd border there is one token: its own rotation.
    """
    h, w = angles.shape[-3:-1]
    flat = rearrange(angles, "... h w d -> (...) d h w")
    summed = F.avg_pool2d(F.pad(flat, (0, w % 2, 0, h % 2)), 2)
    sin, cos = summed.chunk(2, dim=1)
    length = torch.linalg.vector_norm(torch.stack([sin, cos]), dim=0).clamp_min(1e-12)
    result = torch.cat([sin / length, cos / length], dim=1)
    return rearrange(result, "b d h w -> b h w d").reshape(*angles.shape[:-3], *result.shape[-2:], angles.shape[-1])


@lru_cache(maxsize=32)
def relative_index(grid: Grid, part: Grid, step: int, prefix: int, device: torch.device) -> Tensor:
    """Rows (n n) of BEiT's table for the tokens at every `step` rows and columns of the first ones (`part`) of a grid,
    after the prefix token if there is one (1 or 0)."""
    places = 1 + torch.arange(grid[0] * grid[1]).view(grid)[: part[0] : step, : part[1] : step].flatten()
    chosen = torch.cat([torch.arange(prefix), places])
    return gen_relative_position_index(grid)[chosen][:, chosen].to(device)


def relative_bias(table: Tensor, old: Grid, new: Grid, index: Tensor) -> Tensor:
    """BEiT's table (rows h) for the grid `old` -> bias (1 h n n) of tokens of the grid `new` by their index (n n)"""
    rows = (2 * new[0] - 1) * (2 * new[1] - 1) + 3
    table = resize_rel_pos_bias_table(table, new, (rows, table.shape[1]), old_window_size=old)
    return rearrange(table[index], "n k h -> 1 h n k")


def _aliased(rope: Any) -> int:
    """Largest side of a grid on which neighbors are pi or more apart in a RoPE's fastest band."""
    if hasattr(rope, "periods"):  # DINOv3: coordinates from -1 to 1, a period of 1 at the fastest
        return int(4 / float(rope.periods.min()))
    return int(max(rope.ref_feat_shape) / math.pi) if getattr(rope, "ref_feat_shape", None) else 0


def _no_bias() -> float:
    return 0.0


# Sizes ---------------------------------------------------------------------------------------------------------------

NAMED = {  # width, blocks, heads, and the source when none is given
    "hpvit_s": (384, 12, 6, "vit_small_patch16_224"),
    "hpvit_b": (768, 12, 12, "vit_base_patch16_224"),
    "hpvit_l": (1024, 24, 16, "vit_large_patch16_224"),
    "hpvit_h": (1280, 32, 16, "vit_huge_patch14_224"),
}

default_cfgs = generate_default_cfgs(  # without size and classes, which are the source's: timm would pass them on
    {
        name: {"url": "", "input_size": None, "num_classes": -1, "first_conv": "patch_embed.proj", "classifier": "head"}
        for name in ("hpvit", *NAMED)
    }
)


def shape_of(net: Any) -> tuple[int, int, int]:
    """Width, blocks and heads of a plain ViT."""
    heads = next(module.num_heads for module in net.blocks[0].modules() if hasattr(module, "num_heads"))
    return net.embed_dim, len(net.blocks), heads


def name_for(net: Any) -> str:
    """The entry that fits a plain ViT: by width, blocks and heads, or the general one."""
    return next((name for name, (*shape, _) in NAMED.items() if tuple(shape) == shape_of(net)), "hpvit")


def _describe(net: HPViT, source: str) -> dict[str, Any]:
    """`pretrained_cfg` of a pyramid: mean, std, interpolation, ... are its source's."""
    known = get_pretrained_cfg(source, allow_unregistered=True)
    kept = ("interpolation", "crop_pct", "crop_mode", "mean", "std", *(["license"] if "." in source else []))
    heads = {"VisionTransformerDistilled": ("head", "head_dist"), "VisionTransformerSAM": "head.fc"}
    return {key: getattr(known, key) for key in kept if known and getattr(known, key) is not None} | {
        "input_size": (net.in_chans, *(PATCH * side for side in net.grid)),
        "num_classes": net.num_classes,
        "classifier": heads.get(type(net.source).__name__, "head"),
    }


def _hpvit(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> HPViT:
    *shape, default = NAMED.get(variant, ("vit_base_patch16_224",))
    fresh = not kwargs.get("pretrained_cfg")

    def pyramid(**options: Any) -> HPViT:
        net = HPViT(**{"source": default, **options})
        if shape and tuple(shape) != shape_of(net):
            width, blocks, heads = shape_of(net)
            raise UserError(
                f"{variant} is {shape[0]} wide with {shape[1]} blocks of {shape[2]} heads, but its source is {width} "
                f"wide with {blocks} of {heads}: choose {name_for(net)}."
            )
        return net

    build: Any = build_model_with_cfg
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    net = build(pyramid, variant, pretrained, feature_cfg=feature_cfg, **kwargs)
    own: Any = net.model if isinstance(net, FeatureGetterNet) else net
    if fresh:
        net.pretrained_cfg.update(_describe(own, own._model_args["source"]))
    if kwargs.get("img_size"):
        net.pretrained_cfg["input_size"] = (own.in_chans, *to_2tuple(kwargs["img_size"]))
    return net


@register_model
def hpvit(pretrained: bool = False, **kwargs: Any) -> HPViT:
    """Any plain ViT of timm as a pyramid."""
    return _hpvit("hpvit", pretrained, kwargs)


@register_model
def hpvit_s(pretrained: bool = False, **kwargs: Any) -> HPViT:
    """A plain ViT-S as a pyramid."""
    return _hpvit("hpvit_s", pretrained, kwargs)


@register_model
def hpvit_b(pretrained: bool = False, **kwargs: Any) -> HPViT:
    """A plain ViT-B as a pyramid."""
    return _hpvit("hpvit_b", pretrained, kwargs)


@register_model
def hpvit_l(pretrained: bool = False, **kwargs: Any) -> HPViT:
    """A plain ViT-L as a pyramid."""
    return _hpvit("hpvit_l", pretrained, kwargs)


@register_model
def hpvit_h(pretrained: bool = False, **kwargs: Any) -> HPViT:
    """A plain ViT-H as a pyramid."""
    return _hpvit("hpvit_h", pretrained, kwargs)
