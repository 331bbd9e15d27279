"""SimMIM: parity with transformers, the loss, what a masked pixel may reach, and learning."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import fill, learns
from einops import rearrange
from svit_reference import shaken
from torch import nn

from mimkit.errors import UserError
from mimkit.methods.simmim import PixelHead, SimMIM
from mimkit.models.factory import as_map_encoder
from mimkit.models.swin import MaskedSwin
from mimkit.units import replace_masked, sample_mask, serialize, unserialize

SWIN = {"embed_dim": 24, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4, "num_classes": 0}
SWIN["drop_path_rate"] = 0.0  # timm's default is .1


class Pyramid(nn.Module):
    """A network of someone else: an overlapping stem and one merge. It satisfies `MapEncoder` without mimkit."""

    unit_size, token_dim, out_dim = 8, 6, 10

    def __init__(self):
        super().__init__()
        self.stem, self.merge = nn.Conv2d(3, 6, 7, 4, 3), nn.Conv2d(6, 10, 2, 2)

    def encode_masked(self, images, mask, token):
        x = self.stem(images).permute(0, 2, 3, 1)
        x = replace_masked(x, mask.masked, (images.shape[-2] // 8, images.shape[-1] // 8), token)
        return self.merge(x.permute(0, 3, 1, 2)).flatten(2).mT


def encoder(kind, **options):
    """Return a Swin, an SViT or someone else's network with 4 x 4 units of 8 px, and parameters of order 1."""
    if kind == "swin":
        options = {"img_size": 32, "patch_size": 1} | SWIN | options
        return fill(MaskedSwin(timm.create_model("swin_tiny_patch4_window7_224", **options)))
    if kind == "svit":
        return shaken(timm.create_model("svit_nano", patch_size=1, num_classes=0, init_values=1e-6, **options))
    return fill(Pyramid())


def simmim(net, **options):
    """Return SimMIM with a head that fits the encoder."""
    return SimMIM(net, fill(PixelHead(net.out_dim, net.unit_size, net.token_dim)), **options)


@pytest.fixture(scope="session")
def swin_of_transformers():
    """Return transformers' Swin with SimMIM's head, and its configuration. Their import takes seconds."""
    from transformers import SwinConfig, SwinForMaskedImageModeling

    return SwinForMaskedImageModeling, SwinConfig


def test_parity_with_transformers(swin_of_transformers):
    network, configuration = swin_of_transformers
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in SWIN.items()}
    del options["num_classes"], options["drop_path_rate"]
    theirs = fill(network(configuration(image_size=128, patch_size=4, encoder_stride=32, **options))).eval()
    state, own = dict(theirs.state_dict()), {}
    for key in list(state):
        if ".q_proj." in key:
            parts = [state.pop(key.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
            state[key.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    for key, tensor in state.items():
        name = re.sub(r"^swin\.(encoder\.)?", "", key)
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj").replace(
            "embeddings", "patch_embed"
        )
        name = (
            name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2").replace("layernorm", "norm")
        )
        name = name.replace("attention.relative_position_bias.", "attn.").replace("attention.o_proj", "attn.proj")
        name = name.replace("attention.qkv", "attn.qkv")
        name = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)
        own[name] = tensor
    token, weight, bias = own.pop("patch_embed.mask_token"), own.pop("decoder.0.weight"), own.pop("decoder.0.bias")
    ours = simmim(encoder("swin", img_size=128, patch_size=4)).eval()
    ours.encoder.swin.load_state_dict(own)
    shuffled = {"c": 3, "p": 32, "q": 32}  # a pixel shuffle has (c p q)
    ours.decoder.load_state_dict(
        {
            "mask_token": token.flatten(),
            "pred.weight": rearrange(weight[:, :, 0, 0], "(c p q) d -> (p q c) d", **shuffled),
            "pred.bias": rearrange(bias, "(c p q) -> (p q c)", **shuffled),
        }
    )
    images, noise = torch.randn(2, 3, 128, 128), torch.rand(2, 16)
    output = ours(images, noise=noise)
    flags = torch.zeros(2, 16).scatter(1, output.units.masked, 1.0).view(2, 4, 4)
    expected = theirs(images, bool_masked_pos=F.interpolate(flags[:, None], size=32).flatten(1).bool())
    assert output.units.masked.shape == (2, 10)  # ceil(.6 * 16)
    assert torch.allclose(output.loss, expected.loss, rtol=1e-5)
    pixels = rearrange(output.prediction, "b m (p q c) -> b m c p q", p=32, q=32)
    units = serialize(expected.reconstruction, 32)
    for image, masked in enumerate(output.units.masked):
        assert torch.allclose(pixels[image], units[image, masked], rtol=1e-4, atol=1e-4)
    ours.decoder.pred.weight.data = weight[:, :, 0, 0]  # negative control: the order of a pixel shuffle is not ours
    assert not torch.allclose(ours(images, noise=noise).loss, expected.loss, rtol=1e-3)


@pytest.mark.parametrize("kind", ["swin", "svit", "someone's"])
def test_the_loss_equals_loops_over_pixels(kind):
    """The loss is the mean of |prediction - pixel| over masked units, 60 % of all units (SimMIM, section 3)."""
    net = simmim(encoder(kind)).eval()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    output = net(images, noise=noise)
    size = net.encoder.unit_size
    columns, total, count = 32 // size, 0.0, 0
    for image in range(2):
        masked = noise[image].argsort()[int(16 * 0.4) :].tolist()
        assert output.units.masked[image].tolist() == masked
        for k, unit in enumerate(masked):
            for y in range(size):
                for x in range(size):
                    pixel = images[image, :, unit // columns * size + y, unit % columns * size + x]
                    start = 3 * (y * size + x)
                    total += float((output.prediction[image, k, start : start + 3] - pixel).abs().sum())
                    count += 3
    assert count == 2 * 10 * size * size * 3
    assert float(output.loss) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ["swin", "svit", "someone's"])
def test_masked_pixels_do_not_reach_the_prediction(kind, train):
    net = simmim(encoder(kind)).train(train)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    expected = net(images, noise=noise).prediction
    masked = sample_mask(2, 16, 0.6, noise=noise).masked
    units = serialize(images, net.encoder.unit_size)
    units.scatter_(1, masked[:, :, None, None, None].expand(-1, -1, *units.shape[2:]), torch.nan)
    output = net(unserialize(units, (4, 4)), noise=noise)
    assert torch.equal(output.prediction, expected)
    assert output.loss.isnan()  # masked pixels are the target
    if kind != "someone's":  # visible pixels do reach masked units
        other = net(images + 0.1, noise=noise).prediction
        assert not torch.allclose(other, expected, atol=1e-3)


@pytest.mark.parametrize(("kind", "steps"), [("swin", 50), ("svit", 20)])
def test_four_images_are_learned(kind, steps):
    options = {"depths": (1, 1, 1, 1)} if kind == "svit" else {}
    net = encoder(kind, **options)
    net.train()
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    if kind == "svit":
        net.freeze_tail()
    assert learns(SimMIM(net, PixelHead(net.out_dim, net.unit_size, net.token_dim)), steps=steps) < 0.75


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["swin", "svit"])
def test_compiles_as_one_graph(kind):
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    net = simmim(encoder(kind, depths=(1, 1, 1, 1))).train()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    expected = net(images, noise=noise)
    moved = {name: tensor.clone() for name, tensor in net.state_dict().items()}  # running statistics of an SViT
    net.load_state_dict(state)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(images, noise=noise)
    assert torch.allclose(compiled.prediction, expected.prediction, atol=1e-3)
    assert all(torch.allclose(tensor, moved[name], atol=1e-4) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("kind", ["swin", "svit"])
def test_low_precision_has_finite_losses_and_gradients(kind):
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    net = simmim(encoder(kind, depths=(1, 1, 1, 1))).train()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            low = net(images, noise=noise)
        assert low.loss.dtype == torch.float32
        assert low.loss.isfinite()
    low.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert net.bfloat16()(images.bfloat16(), noise=noise).loss.isfinite()


def test_images_need_not_be_square():
    for kind in ("swin", "svit"):
        options = {"img_size": (32, 64)} if kind == "swin" else {}
        net = simmim(encoder(kind, **options), mask_ratio=0.5)
        output = net(torch.randn(1, 3, 32, 64))
        assert output.prediction.shape == (1, 16, 192)


def test_wrong_combinations_say_what_to_change():
    net = encoder("svit")
    head = PixelHead(net.out_dim, 8, 32)
    with pytest.raises(UserError, match=r"ResNet has no encode_masked. Pass an SViT, or mimkit.models.swin.MaskedSwin"):
        SimMIM(timm.create_model("resnet18"), head)
    with pytest.raises(UserError, match="ResNet is not timm's SwinTransformer: choose one such as swin_base"):
        as_map_encoder(timm.create_model("resnet18"))
    with pytest.raises(
        UserError, match=r"The head is PixelHead\(8, 8, 32\), but the encoder needs PixelHead\(192, 8, 32\)"
    ):
        SimMIM(net, PixelHead(8, 8, 32))
    for ratio in (0, 1.0):
        with pytest.raises(UserError, match=f"mask_ratio is {ratio}"):
            SimMIM(net, head, ratio)
    with pytest.raises(UserError, match=r"height of 30 px .* 8 px"):
        SimMIM(net, head)(torch.zeros(1, 3, 30, 32))
    with pytest.raises(
        UserError, match=r"predicts 64 values per unit, but the target has 192. Build it with in_chans=3"
    ):
        SimMIM(net, PixelHead(192, 8, 32, 1))(torch.zeros(1, 3, 32, 32))
