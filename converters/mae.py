"""facebookresearch/mae: encoder-only, with its decoder, and fine-tuned. The encoder's names are timm's already."""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from mimkit.conversion import Family, Remap

State = dict[str, Tensor]
DECODER = {"decoder_embed.": "embed.", "decoder_blocks.": "blocks.", "decoder_norm.": "norm.", "decoder_pred.": "pred."}
COMPUTED = ("decoder_pos_embed", "relative_position_index")  # sin-cos positions and an index, made anew


def split(state: State) -> tuple[State, State]:
    """State of a file, of a ViT or a HiViT -> (encoder's, decoder's; the latter is empty in an encoder-only file).

    In encoder-only files of HiViT the decoder's `mask_token` is left over alone.
    """
    encoder, decoder = {}, {}
    for name, tensor in state.items():
        prefix = next((p for p in DECODER if name.startswith(p)), None)
        if prefix:
            decoder[DECODER[prefix] + name.removeprefix(prefix)] = tensor
        elif name == "mask_token":
            decoder[name] = tensor
        elif name not in COMPUTED:
            encoder[name] = tensor
    return encoder, decoder if len(decoder) > 1 else {}


def remap(m: Remap) -> None:
    """The encoder stays as it is."""
    m.drop(r"decoder_.*|mask_token", "the decoder of pre-training")
    m.rename(r"(cls_token|pos_embed|(?:patch_embed|blocks|norm|fc_norm|head)\..*)", r"\1")


FAMILY = Family(
    title="facebookresearch/mae",
    marks=(r"cls_token", r"pos_embed", r"blocks\.0\.attn\.qkv\.bias", r"blocks\.0\.mlp\.fc1\.weight"),
    remap=remap,
    data={"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD},
    aliases={
        "vit_b_mae": "vit_base_patch16_224.mae",
        "vit_l_mae": "vit_large_patch16_224.mae",
        "vit_h_mae": "vit_huge_patch14_224.mae",
    },
)
