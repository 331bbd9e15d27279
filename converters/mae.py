"""Released MAE checkpoints, of a plain ViT (facebookresearch/mae) or a HiViT: encoder and decoder in one flat state.

The encoder's names are timm's and mimkit's own already. In encoder-only files of HiViT the decoder's `mask_token` is
left over alone.
"""

from torch import Tensor

State = dict[str, Tensor]
DECODER = {"decoder_embed.": "embed.", "decoder_blocks.": "blocks.", "decoder_norm.": "norm.", "decoder_pred.": "pred."}
COMPUTED = ("decoder_pos_embed", "relative_position_index")  # sin-cos positions and an index, made anew


def split(state: State) -> tuple[State, State]:
    """State of a file -> (encoder's, decoder's; the latter is empty in an encoder-only file)"""
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
