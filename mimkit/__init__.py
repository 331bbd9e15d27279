"""mimkit: pre-train hierarchical vision transformers by masked autoencoding, at plain-ViT speed."""

import mimkit.models  # noqa: F401  registers the networks with timm
