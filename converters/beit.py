"""BEiT and BEiT v2 files of github.com/microsoft/unilm.

Pre-trained files end in a norm before the loss, fine-tuned ones in `fc_norm` and `head`. The names are timm's.
"""

from mimkit.conversion.computed import is_relative_index
from mimkit.conversion.family import Family, Remap


def remap(m: Remap) -> None:
    """Keep all names, and drop what only pre-training has."""
    m.drop(r".*relative_position_index", "index buffer, recomputed", is_relative_index)
    m.drop(r"mask_token|lm_head\..*|cls_pt_layers\..*", "used in masked pre-training only")
    m.rename(r"(cls_token|pos_embed|(?:patch_embed|blocks|norm|fc_norm|head|rel_pos_bias)\..*)", r"\1")


FAMILY = Family(
    title="microsoft/unilm (BEiT, BEiT v2)",
    marks=(r"cls_token", r"blocks\.0\.attn\.q_bias", r"(.*\.)?relative_position_bias_table", r"blocks\.0\.gamma_1"),
    remap=remap,
    aliases={
        "beit_b": "beit_base_patch16_224.in22k_ft_in22k",
        "beit_l": "beit_large_patch16_224.in22k_ft_in22k",
        "beitv2_b": "beitv2_base_patch16_224.in1k_ft_in22k",
        "beitv2_l": "beitv2_large_patch16_224.in1k_ft_in22k",
    },
)
