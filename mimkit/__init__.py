"""Pre-train hierarchical vision transformers by masked autoencoding, at the speed of a plain ViT.

Importing mimkit registers its networks with timm.
"""

import mimkit.models  # noqa: F401
