"""Networks. Importing this package registers them with timm."""

from mimkit.models.hivit import HiViT as HiViT
from mimkit.models.hpvit import HPViT as HPViT
from mimkit.models.svit import SViT as SViT
from mimkit.models.vit import UnitViT as UnitViT
