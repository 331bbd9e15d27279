"""HiViT: a hierarchical vision transformer in which nothing crosses a mask unit before the main stage.

Zhang et al., "HiViT: A Simpler and More Efficient Design of Hierarchical Vision Transformer", ICLR 2023.

A mask unit is a square of 4 x 4 patches. Two stem stages apply MLP blocks to each patch on its own, and each stem stage
ends with a merge of 2 x 2 neighboring tokens. After the second merge a unit is one token, and the main stage is a plain
ViT on these tokens. Masked units can therefore be dropped as pixels, and nothing is computed for them.

Parameters have the names of the released checkpoints.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, resample_abs_pos_embed, resample_patch_embed, to_2tuple
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.models.layers.norm import set_eps
from mimkit.models.layers.pos_embed import sincos_positions
from mimkit.models.layers.windows import global_blocks, into_windows, out_of_windows, window_sides
from mimkit.units import Grid, Grids, gather, one_grid, serialize, unit_grid

UNIT_PATCHES = 4  # patches along a side of a mask unit: two merges of 2 x 2 turn them into one token


class UnitPatchEmbed(nn.Module):
    """Patch embedding of units: a non-overlapping convolution followed by a norm."""

    def __init__(self, patch_size: int, in_chans: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, units: Tensor) -> Tensor:
        """(b v c p p) -> (b v ih iw d)"""
        p = self.patch_size
        # kernel size and stride are equal, so the convolution is a matrix product over patches
        patches = rearrange(units, "b v c (ih p) (iw q) -> b v ih iw (c p q)", p=p, q=p)
        return self.norm(F.linear(patches, self.proj.weight.flatten(1), self.proj.bias))


class StemBlock(nn.Module):
    """Pre-norm MLP block of the stem. It has no attention and treats every token on its own."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(b v ih iw d) -> (b v ih iw d)"""
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Merge(nn.Module):
    """Merge 2 x 2 neighboring tokens into one token of twice the width.

    The four tokens are concatenated in the order (dx dy d), as the released weights expect.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b v 2ih 2iw d) -> (b v ih iw 2d)"""
        x = rearrange(x, "b v (ih dy) (iw dx) d -> b v ih iw (dx dy d)", dy=2, dx=2)
        return self.reduction(self.norm(x))


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        grid: grid (gh gw) of a relative position bias table in Swin's form, or None for no relative bias.
    """

    def __init__(self, dim: int, num_heads: int, grid: Grid | None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if grid:
            offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(b n d) -> (b n d), with an optional bias (h n n), (b 1 1 n) or (b h n n) on the attention logits"""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v) if bias is None else F.scaled_dot_product_attention(q, k, v, bias)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Pre-norm transformer block of the main stage."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, grid: Grid | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, grid)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(b n d) -> (b n d), with an optional bias (h n n), (b 1 1 n) or (b h n n) on the attention logits"""
        x = x + self.drop_path(self.attn(self.norm1(x), bias))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class HiViT(nn.Module):
    """HiViT, in one of two forms.

    The supervised form (default) has a relative position bias in every main block, learned absolute positions, mean
    pooling, `fc_norm` and a head.

    The unit form (`unit_form=True`) is the encoder of masked pre-training. It has no relative bias, fixed sine-cosine
    positions, no `fc_norm`, and a final `norm` on the output of `encode_units`. Build it with `num_classes=0` to leave
    out the head.

    Args:
        img_size: input size in pixels, one number or (height, width), multiples of `unit_size` = 4 x `patch_size`.
            The network runs on other sizes too: position and relative-bias tables are then resampled from this size.
        patch_size: side of a patch in pixels.
        embed_dim: width of the main stage. The two stem stages have a quarter and a half of it.
        depths: number of MLP blocks in the first stem stage, MLP blocks in the second, attention blocks in the main.
        global_pool: 'avg' for the mean of all tokens, or '' to classify each token.
        unit_form: build the form for masked pre-training.
        multi_scale: concatenate the features before each merge to the output of `encode_units`, which is then
            7 x `embed_dim` wide. Needs the unit form.
        final_norm: end in the form's own norm, `fc_norm` or `norm`. mmpretrain's networks have neither.
        norm_eps: epsilon of all norms. mmpretrain's classifiers have 1e-5.
        pos_antialias: resample absolute positions as timm does, by antialiased bicubic interpolation. False is plain
            bicubic interpolation, as in the authors' code, and is set for their weights.
        window: largest side, in units, of attention windows for large images, or 0 for none. The last block of each
            quarter stays global, and bias tables are resampled to the window. `encode_units` needs 0, because the
            visible units do not form whole windows.
    """

    pretrained_cfg: dict[str, Any]
    global_pool: str

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 512,
        depths: tuple[int, int, int] = (4, 4, 20),
        num_heads: int = 8,
        stem_mlp_ratio: float = 3.0,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        unit_form: bool = False,
        multi_scale: bool = False,
        final_norm: bool = True,
        norm_eps: float = 1e-6,
        pos_antialias: bool = True,
        window: int = 0,
    ):
        super().__init__()
        if multi_scale and not unit_form:
            raise UserError("multi_scale=True needs the form for masked pre-training: pass unit_form=True too.")
        if embed_dim % num_heads or embed_dim % 4:
            raise UserError(
                f"embed_dim {embed_dim} does not divide by 4 and by num_heads {num_heads}: change one of them."
            )
        height, width = to_2tuple(img_size)
        self.in_chans, self.num_classes, self.global_pool = in_chans, num_classes, global_pool
        self.unit_form, self.multi_scale, self.pos_antialias = unit_form, multi_scale, pos_antialias
        self.unit_size = UNIT_PATCHES * patch_size
        self.grid = unit_grid(height, width, self.unit_size)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.out_dim = 7 * embed_dim if multi_scale else embed_dim  # a unit has 16/4 + 4/2 + 1 = 7 widths
        self.num_prefix_tokens = 0
        self.grad_checkpointing = False

        dims = (embed_dim // 4, embed_dim // 2, embed_dim)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        bias_grid = None if unit_form else self.grid
        self.patch_embed = UnitPatchEmbed(patch_size, in_chans, dims[0])
        self.absolute_pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], embed_dim))
        self.blocks = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if stage:
                self.blocks.append(Merge(dims[stage - 1]))
            for _ in range(depth):
                rate, is_main = next(rates), stage == 2
                block = (
                    Block(dim, num_heads, mlp_ratio, rate, bias_grid)
                    if is_main
                    else StemBlock(dim, stem_mlp_ratio, rate)
                )
                self.blocks.append(block)
            module = f"blocks.{len(self.blocks) - 1}"
            self.feature_info.append({"num_chs": dim, "reduction": patch_size * 2**stage, "module": module})
        self.set_window(window)

        self.norm = nn.LayerNorm(self.out_dim) if unit_form and final_norm else nn.Identity()
        self.fc_norm = nn.LayerNorm(embed_dim) if final_norm and not unit_form else nn.Identity()
        set_eps(self, norm_eps)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.init_weights()

    def set_window(self, window: int) -> None:
        """Set the largest side, in units, of the main stage's attention windows; 0 disables windows."""
        main = [i for i, block in enumerate(self.blocks) if isinstance(block, Block)]
        self.window, self.global_blocks = window, [main[i] for i in global_blocks(len(main), window)]
        update_model_args(self, window=window)

    def set_pos_antialias(self, antialias: bool) -> None:
        """Set how positions are resampled: as timm does, or as the authors' code does."""
        self.pos_antialias = antialias
        update_model_args(self, pos_antialias=antialias)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize projections as MAE does: Xavier-uniform, which also suits networks as narrow as 32 channels."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.unit_form:
            self.absolute_pos_embed.requires_grad_(False).copy_(sincos_positions(self.embed_dim, self.grid)[None])
        else:
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)

    # Forward ---------------------------------------------------------------------------------------------------------

    def positions(self, grid: Grid) -> Tensor:
        """Return the position table (1 n d), resampled if the grid is not the one that the network was built for."""
        return resample_positions(self.absolute_pos_embed, self.grid, grid, self.pos_antialias)

    def relative_bias(self, block: Block, grid: Grid) -> Tensor | None:
        """Return the relative position bias (h n n) of a main block for this grid, or None in the unit form."""
        if self.unit_form:
            return None
        table = resample_bias_table(block.attn.relative_position_bias_table, self.grid, grid)
        return bias_from_table(table, grid)

    def run_main_block(self, i: int, x: Tensor, grid: Grid) -> Tensor:
        """(b v d) -> (b v d): run block i, globally or in windows of the grid (gh gw)"""
        block: Any = self.blocks[i]
        sides = grid if i in self.global_blocks else window_sides(grid, self.window)
        bias = self.relative_bias(block, sides)
        x, mask = into_windows(x, grid, sides)
        if mask is not None:
            bias = mask if bias is None else mask + bias
        return out_of_windows(self._run(block, x, bias), grid, sides)

    def _run(self, block: nn.Module, *args: Tensor | None) -> Tensor:
        return checkpoint(block, *args) if self.grad_checkpointing and self.training else block(*args)

    def stages(self, units: Tensor, index: Tensor | None, grid: Grid, last: int = 2) -> list[Tensor]:
        """(b v c p p) -> [(b v 4 4 d/4), (b v 2 2 d/2), (b v 1 1 d)], the outputs of the stages up to `last`

        `index` (b v) holds the positions of the units in the grid (gh gw); None stands for all units in order.
        """
        x = self.patch_embed(units)
        outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if isinstance(block, Block):
                x = self.run_main_block(i, x, grid)
                continue
            if isinstance(block, Merge):
                outputs.append(x)
                if len(outputs) > last:
                    return outputs
            x = self._run(block, x)
            if isinstance(block, Merge) and len(outputs) == 2:  # a unit is one token now, and the main stage begins
                x = rearrange(x, "b v 1 1 d -> b v d")
                x = x + (self.positions(grid) if index is None else gather(self.positions(grid), index))
        return [*outputs, rearrange(x, "b v d -> b v 1 1 d")]

    def encode_units(self, units: Tensor, index: Tensor, grid: Grids) -> Tensor:
        """(b v c p p) -> (b v out_dim): encode units at positions `index` (b v) of the grid (gh gw)

        Raises:
            UserError: the network is not in the unit form, or it has windows, or there is one grid for each image.
        """
        grid = one_grid(grid)
        if not self.unit_form:
            raise UserError(
                "A supervised HiViT has a relative position bias, so it cannot skip units: pass unit_form=True."
            )
        if self.window:
            raise UserError(f"Visible units form no whole windows of {self.window} to attend in: pass window=0.")
        outputs = self.stages(units, index, grid)[0 if self.multi_scale else -1 :]
        return self.norm(torch.cat([x.flatten(2) for x in outputs], dim=-1))

    def forward_features(self, x: Tensor) -> Tensor:
        """(b c H W) -> (b n d), the tokens of the main stage"""
        grid = unit_grid(x.shape[-2], x.shape[-1], self.unit_size)
        return rearrange(self.stages(serialize(x, self.unit_size), None, grid)[-1], "b n 1 1 d -> b n d")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(b n d) -> (b classes), or (b d) with `pre_logits`"""
        x = self.head_drop(self.fc_norm(x.mean(dim=1) if self.global_pool else x))
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
        """(b c H W) -> tokens (b n d) and maps (b d h w) at strides of 1, 2 and 4 patches, or the maps only

        This is timm's interface. `norm` has no effect, because no norm follows the stages. With `intermediates_only`
        the network stops after the last requested map.
        """
        if output_fmt != "NCHW":
            raise UserError(f"HiViT returns maps as NCHW only, not {output_fmt!r}: pass output_fmt='NCHW'.")
        take, last = feature_take_indices(len(self.feature_info), indices)
        gh, gw = grid = unit_grid(x.shape[-2], x.shape[-1], self.unit_size)
        outputs = self.stages(serialize(x, self.unit_size), None, grid, last if intermediates_only else 2)
        maps = [rearrange(outputs[i], "b (gh gw) ih iw d -> b d (gh ih) (gw iw)", gh=gh, gw=gw) for i in take]
        return maps if intermediates_only else (rearrange(outputs[-1], "b n 1 1 d -> b n d"), maps)

    # timm's other interfaces -----------------------------------------------------------------------------------------

    @property
    def merges(self) -> list[int]:
        """Return the indices of the two merges in `blocks`."""
        return [i for i, block in enumerate(self.blocks) if isinstance(block, Merge)]

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers that the selected maps do not need, and return the indices of these maps."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        if last < 2:  # keep the merge after the stage, because `stages` stores the stage's output there
            self.blocks = self.blocks[: self.merges[last] + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0)
        return take

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one. `global_pool` is 'avg', '' for tokens, or None to keep the current one."""
        if global_pool not in (None, "avg", ""):
            raise UserError(f"HiViT has no global_pool {global_pool!r}: choose 'avg', or '' for no pooling.")
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        like: Any = {"device": self.absolute_pos_embed.device, "dtype": self.absolute_pos_embed.dtype}
        self.head = nn.Linear(self.num_features, num_classes, **like) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay: position and relative-bias tables."""
        return {n for n, _ in self.named_parameters() if n.endswith(("absolute_pos_embed", "position_bias_table"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the layers for timm's layer decay: each block is a layer, and a merge belongs to the block before."""
        merges = [(rf"^blocks\.{i}\.", (i - 1,)) for i in self.merges]
        return {
            "stem": r"^absolute_pos_embed|^patch_embed",
            "blocks": r"^blocks" if coarse else [*merges, (r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


# Resampling of tables ------------------------------------------------------------------------------------------------


def resample_positions(table: Tensor, old: Grid, new: Grid, antialias: bool) -> Tensor:
    """Resample a position table from the grid `old` to `new`, bicubic: (1 n d) -> (1 n' d)."""
    return resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=0, antialias=antialias)


def resample_bias_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resample a relative-bias table from the grid `old` to `new`: (offsets h) -> (offsets' h).

    A grid (gh gw) has (2gh-1) (2gw-1) offsets, in row-major order.
    """
    if old == new:
        return table
    maps = rearrange(table, "(y x) h -> 1 h y x", y=2 * old[0] - 1)
    maps = F.interpolate(maps, size=(2 * new[0] - 1, 2 * new[1] - 1), mode="bicubic")
    return rearrange(maps, "1 h y x -> (y x) h")


def bias_from_table(table: Tensor, grid: Grid) -> Tensor:
    """Expand a relative-bias table to all pairs of grid positions by their offset: (offsets h) -> (h n n).

    The pairs are views of the table through sliding windows. Indexing with (n n) indices would give the same bias,
    but autograd would keep the indices.
    """
    gh, gw = grid
    if torch.compiler.is_exporting():  # ONNX has no sliding windows whose size is known only when it runs
        y, x = torch.arange(gh, device=table.device), torch.arange(gw, device=table.device)
        rows, columns = y[:, None] - y + gh - 1, x[:, None] - x + gw - 1
        index = rearrange(rows, "y v -> y 1 v 1") * (2 * gw - 1) + rearrange(columns, "x u -> 1 x 1 u")
        return rearrange(table[index], "y x v u h -> h (y x) (v u)")
    views = rearrange(table, "(y x) h -> h y x", y=2 * gh - 1).unfold(1, gh, 1).unfold(2, gw, 1)
    return rearrange(views.flip(3, 4), "h y x v u -> h (y x) (v u)")  # the offset i - j decreases as j increases


def checkpoint_filter_fn(state: dict[str, Tensor], model: HiViT) -> dict[str, Tensor]:
    """Adapt a checkpoint to the model's input and patch size by resampling its tables and its embedding kernel.

    Raises:
        UserError: the checkpoint's grid is not square, and its `pretrained_cfg` does not name its input size.
    """
    kernel, n = state["patch_embed.proj.weight"], state["absolute_pos_embed"].shape[1]
    unit_size = UNIT_PATCHES * kernel.shape[-1]
    _, height, width = model.pretrained_cfg["input_size"]  # the checkpoint's, if its config names one
    side = round(n**0.5)
    candidates = [(height // unit_size, width // unit_size), model.grid, (side, side)]
    old = next((grid for grid in candidates if grid[0] * grid[1] == n), None)
    if old is None:
        raise UserError(
            f"The checkpoint's table of {n} positions is not square: add its input_size to its config.json."
        )
    if old != model.grid:
        for name, tensor in state.items():
            if name == "absolute_pos_embed":
                state[name] = resample_positions(tensor, old, model.grid, model.pos_antialias)
            elif name.endswith("relative_position_bias_table"):
                state[name] = resample_bias_table(tensor, old, model.grid)
    state["patch_embed.proj.weight"] = resample_patch_embed(kernel, [model.patch_embed.patch_size] * 2)
    return state


# Sizes ---------------------------------------------------------------------------------------------------------------


default_cfgs = generate_default_cfgs(
    {
        f"hivit_{size}": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": False,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
        for size in ("nano", "t", "s", "b", "b24", "l")
    }
)


def _hivit(
    variant: str, pretrained: bool, dim: int, depths: tuple[int, int, int], heads: int, kwargs: dict[str, Any]
) -> HiViT:
    build: Any = build_model_with_cfg
    return build(
        HiViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
        **({"embed_dim": dim, "depths": depths, "num_heads": heads} | kwargs),
    )


@register_model
def hivit_nano(pretrained: bool = False, **kwargs: Any) -> HiViT:
    """Build a HiViT for tests and demonstrations on a CPU. This size is not in the paper."""
    return _hivit("hivit_nano", pretrained, 128, (1, 1, 4), 4, kwargs)


@register_model
def hivit_t(pretrained: bool = False, **kwargs: Any) -> HiViT:
    """Build HiViT-T (paper, table 2)."""
    return _hivit("hivit_t", pretrained, 384, (2, 2, 10), 6, kwargs)


@register_model
def hivit_s(pretrained: bool = False, **kwargs: Any) -> HiViT:
    """Build HiViT-S (paper, table 2)."""
    return _hivit("hivit_s", pretrained, 384, (4, 4, 20), 6, kwargs)


@register_model
def hivit_b(pretrained: bool = False, **kwargs: Any) -> HiViT:
    """Build HiViT-B (paper, table 2), the size of the released MAE weights."""
    return _hivit("hivit_b", pretrained, 512, (4, 4, 20), 8, kwargs)


@register_model
def hivit_b24(pretrained: bool = False, **kwargs: Any) -> HiViT:
    """Build the 'base' network of the official README, which has 24 main blocks instead of 20."""
    return _hivit("hivit_b24", pretrained, 512, (4, 4, 24), 8, kwargs)


@register_model
def hivit_l(pretrained: bool = False, **kwargs: Any) -> HiViT:
    """Build HiViT-L, as defined in mmpretrain."""
    return _hivit("hivit_l", pretrained, 768, (4, 4, 40), 12, kwargs)
