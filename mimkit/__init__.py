"""Pre-train hierarchical vision transformers by masked autoencoding, at the speed of a plain ViT.

Importing mimkit registers its networks with timm.
"""

import os

if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    # Threads that wait for each other sleep instead of spinning: on a busy machine, spinning makes two threads ten
    # times slower than one. OpenMP reads this when torch is imported
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

import mimkit.models  # noqa: F401
