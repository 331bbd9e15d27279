"""SViT files of github.com/hhb072/STViT (stvit-{small,base,large}-{224,384}.pth), for our SViT.

Their modules are nested deeper, and their linear layers are 1x1 convolutions.
"""

from typing import Any

from einops import rearrange
from torch import Tensor

from mimkit.conversion.computed import is_identity_kernel
from mimkit.conversion.family import Family, Remap

BLOCK = r"layers\.(\d)\.blocks\.(\d+)\."


def linear(tensor: Tensor) -> Tensor:
    """Turn the weight of a 1x1 convolution (o i 1 1) into that of a linear layer (o i). A bias stays."""
    return tensor.flatten(1) if tensor.ndim == 4 else tensor


def qkv(tensor: Tensor) -> Tensor:
    """Reorder output channels from [q, k, v] of each head to q of all heads, k of all heads, v of all heads."""
    heads = -(-len(tensor) // 3 // 64)  # in all three sizes: width 96 has 2 heads of 48, other widths have heads of 64
    return rearrange(linear(tensor), "(h three d) ... -> (three h d) ...", three=3, h=heads)


def remap(m: Remap) -> None:
    """Rename all tensors, and drop the fixed kernels that collect neighbors."""
    kernels = rf"{BLOCK}attn\.(?:unfold|fold)\.weights"
    m.drop(kernels, "fixed kernel that collects neighbors; our code slices instead", is_identity_kernel)
    for i in range(4):
        m.rename(rf"patch_embed\.proj\.{3 * i}\.(.*)", rf"stem.convs.{i}.\1")
        m.rename(rf"patch_embed\.proj\.{3 * i + 2}\.(.*)", rf"stem.norms.{i}.\1")
    m.rename_all(
        {
            rf"{BLOCK}pos_embed\.conv\.(.*)": r"stages.\1.\2.pos_conv.\3",
            rf"{BLOCK}norm1\.norm\.(.*)": r"stages.\1.\2.norm1.\3",
            rf"{BLOCK}norm2\.(.*)": r"stages.\1.\2.norm2.\3",
            rf"{BLOCK}mlp2\.conv\.conv\.(.*)": r"stages.\1.\2.mlp.conv.\3",
            r"layers\.(\d)\.downsample\.proj\.0\.(.*)": r"merges.\1.conv.\2",
            r"layers\.(\d)\.downsample\.proj\.1\.(.*)": r"merges.\1.norm.\2",
            r"((?:norm|head)\..*)": r"\1",
        }
    )
    m.rename(
        rf"{BLOCK}attn\.stoken_refine\.qkv\.(.*)", r"stages.\1.\2.attn.qkv.\3", qkv, "channels reordered to q, k, v"
    )
    m.rename(
        rf"{BLOCK}attn\.stoken_refine\.proj\.(.*)", r"stages.\1.\2.attn.proj.\3", linear, "1x1 convolution made linear"
    )
    m.rename(rf"{BLOCK}mlp2\.(fc\d)\.(.*)", r"stages.\1.\2.mlp.\3.\4", linear, "1x1 convolution made linear")
    m.rename(rf"{BLOCK}gamma_(\d)", r"stages.\1.\2.ls\3.gamma", Tensor.flatten)
    m.rename(r"proj\.(.*)", r"tail.\1", linear, "1x1 convolution made linear")


def options(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the network that the tensors show."""
    blocks = {tuple(name.split(".")[1:3]) for name in state if name.startswith("stages.")}
    return {
        "depths": [sum(stage == str(s) for stage, _ in blocks) for s in range(4)],
        "in_chans": state["stem.convs.0.weight"].shape[1] if "stem.convs.0.weight" in state else 3,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
    }


FAMILY = Family(
    title="hhb072/STViT",
    marks=(r"patch_embed\.proj\.11\.weight", r"layers\.0\.blocks\.0\.attn\.stoken_refine\.qkv\.weight"),
    remap=remap,
    options=options,
    reader=None,
    parity_test="test_svit",
)
