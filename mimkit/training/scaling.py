"""Scale the published settings to narrower networks and smaller data sets than they were published for."""

import math
from typing import Any, NamedTuple

WIDTH = 512  # of HiViT-B and of the published decoders
NARROWEST, LARGE = 384, 200_000  # width and images from which on depth and schedule are the published ones
STEPS_PER_EPOCH, SMALLEST_BATCH = 48, 32  # LARGE images are 48 steps of the published 4096
MIN_STEPS = 3_000  # of a whole run
MAX_WARMUP = 0.1  # fraction of the epochs
HEAD_DIM = 32  # channels of an attention head of the published decoders


class Change(NamedTuple):
    """An option that has another value than the published one."""

    name: str
    value: Any
    published: Any
    reason: str

    def __str__(self) -> str:
        """Format the change as one line."""
        flag = self.name.replace("_", "-")
        return f"--{flag} {self.value:.4g} instead of the published {self.published:.4g}: {self.reason}"


def scaled(
    options: dict[str, Any],
    given: set[str],
    published: dict[str, Any],
    width: int,
    parameters: int,
    images: int,
    divisor: int = 1,
) -> list[Change]:
    """Return what changes in the options that the user did not set, for a network and a number of images.

    Args:
        options: all options of a recipe.
        given: names of the options that the user set, which stay.
        published: the published value of each option.
        width: channels of the encoder's last stage.
        parameters: number of parameters of the encoder.
        images: number of images.
        divisor: processes times gradient accumulation steps, by which a batch must be divisible.
    """
    options, changes = dict(options), list[Change]()
    peak = published["blr"] * published["batch_size"] / 256

    def change(name: str, value: Any, reason: str) -> None:
        if name not in given and value != options[name]:
            changes.append(Change(name, value, peak if name == "lr" else published[name], reason))
            options[name] = value

    large = images >= LARGE and width >= NARROWEST
    if "decoder_dim" in options:
        multiple = HEAD_DIM if width >= HEAD_DIM else 4
        change("decoder_dim", min(options["decoder_dim"], width - width % multiple), f"the encoder is {width} wide")
        dim = options["decoder_dim"]
        heads = next(count for count in range(max(1, dim // HEAD_DIM), 0, -1) if dim % count == 0)
        change("decoder_heads", heads, f"a head has {dim // heads} channels")
        depth = options["decoder_depth"] if large else max(1, parameters // 3 // (12 * dim**2))  # parameters of a block
        reason = f"a third of the encoder's {parameters / 1e6:.2f} M parameters"
        change("decoder_depth", min(options["decoder_depth"], depth), reason)
    if large:
        return changes

    batch = max(SMALLEST_BATCH, 2 ** int(math.log2(max(1, images / STEPS_PER_EPOCH))))
    batch = math.ceil(min(options["batch_size"], batch, images) / divisor) * divisor
    batch = batch if batch <= images else max(1, images // divisor) * divisor
    steps = images // batch
    change("batch_size", batch, f"{images:,} images make {steps} step{'s' if steps != 1 else ''} per epoch")
    enough = math.ceil(MIN_STEPS / max(1, images // options["batch_size"]))
    epochs = round(options["epochs"] * min(1.0, width / WIDTH) ** 2)
    reason = f"the square of the encoder's width, {width} of {WIDTH}" if epochs >= enough else f"{MIN_STEPS:,} steps"
    change("epochs", min(options["epochs"], max(epochs, enough)), reason)
    change("warmup_epochs", min(options["warmup_epochs"], MAX_WARMUP * options["epochs"]), "a tenth of the epochs")
    ratio = options["batch_size"] / published["batch_size"]
    if "blr" not in given and ratio != 1:
        change("lr", peak * math.sqrt(ratio), "AdamW's rate follows the square root of the batch size")
    return changes
