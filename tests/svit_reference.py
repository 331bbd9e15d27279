"""A slow, dense SViT for tests, in which every mask is explicit. It uses the names of the released checkpoints."""

import re

import torch
import torch.nn.functional as F
from conftest import fill
from einops import rearrange
from torch import nn

ALL = frozenset(("average", "association", "keys", "batchnorm"))  # masks that skipping needs


@torch.no_grad()
def shaken(model):
    """Set every parameter and running statistic to order 1. A LayerScale of 1e-6 would hide wrong attention."""
    fill(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5)
    return model


def released(net):
    """Return the state dict of an SViT in the names and layouts of the released checkpoints."""
    state = {}
    for key, tensor in net.state_dict().items():
        if match := re.fullmatch(r"stem\.(convs|norms)\.(\d)\.(.*)", key):
            number = 3 * int(match[2]) + (0 if match[1] == "convs" else 2)
            key = f"patch_embed.proj.{number}.{match[3]}"
        key = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"layers.\1.blocks.\2.", key)
        key = re.sub(r"^merges\.(\d)\.conv", r"layers.\1.downsample.proj.0", key)
        key = re.sub(r"^merges\.(\d)\.norm", r"layers.\1.downsample.proj.1", key)
        for ours, theirs in {
            "pos_conv": "pos_embed.conv",
            ".norm1": ".norm1.norm",
            "attn.": "attn.stoken_refine.",
            "mlp.conv": "mlp2.conv.conv",
            "mlp.": "mlp2.",
            "ls1.gamma": "gamma_1",
            "ls2.gamma": "gamma_2",
        }.items():
            key = key.replace(ours, theirs)
        key = re.sub(r"^tail", "proj", key)
        if key.endswith(("qkv.weight", "qkv.bias")):  # [three, heads, d] -> per head [three, d]
            stage = int(key.split(".")[1])
            heads = net.stages[stage][0].attn.num_heads
            tensor = tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
        if tensor.ndim == 2 and not key.startswith("head"):
            tensor = tensor[:, :, None, None]
        if "gamma" in key:
            tensor = tensor[None, :, None, None]
        state[key] = tensor.clone()
    for key in [key for key in state if key.endswith("qkv.weight")]:
        for kind in ("unfold", "fold"):
            state[key.replace("stoken_refine.qkv.weight", f"{kind}.weights")] = torch.eye(9).view(9, 1, 3, 3)
    return state


class Reference:
    """A dense SViT that computes all positions, and applies masks wherever positions are combined.

    Args:
        state: state dict in the names of the released checkpoints.
        strides: strides of the stem's convolutions.
        heads: attention heads of the four stages.
        train: normalize by the statistics of the batch, and store them in `stats`.
        keep: units (b gh gw) that are visible, or None for all.
        masks: the masks to apply, a subset of `ALL`.
        noise: overwrite masked positions with noise before each mask, to make a missing mask visible.
    """

    def __init__(self, state, strides=(1, 1, 1, 1), heads=(1, 2, 4, 6), train=False, keep=None, masks=ALL, noise=False):
        self.state, self.strides, self.heads, self.train = state, strides, heads, train
        self.kept, self.masks, self.noise, self.stats = keep, masks, noise, {}

    def keep(self, x):
        """Return the visible positions (b 1 h w) at the resolution of a map (b c h w)."""
        if self.kept is None:
            return torch.ones_like(x[:, :1], dtype=torch.bool)
        return F.interpolate(self.kept[:, None].double(), size=x.shape[-2:]).bool()

    def dirty(self, x):
        """Overwrite masked positions with noise, if the network was built with `noise`."""
        return torch.where(self.keep(x), x, torch.randn_like(x) * 3) if self.noise else x

    def average(self, x):
        """Replace masked tokens by the mean of the image's visible tokens."""
        x = self.dirty(x)
        if "average" not in self.masks:
            return x
        keep = self.keep(x)
        mean = (x * keep).sum((2, 3), keepdim=True) / keep.sum((2, 3), keepdim=True)
        return torch.where(keep, x, mean)

    def conv(self, name, x, stride=1):
        weight = self.state[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(self.average(x), weight, self.state[f"{name}.bias"], stride, 1, groups=groups)

    def linear(self, name, x):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def batch_norm(self, name, x):
        x = self.dirty(x)
        mean, var = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        if self.train:
            rows = x.movedim(1, -1)
            rows = rows[self.keep(x)[:, 0]] if "batchnorm" in self.masks else rows.flatten(0, 2)
            mean, var = rows.mean(0), rows.var(0, correction=0)
            self.stats[name] = mean, rows.var(0)
        out = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
        return out * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    def attend(self, name, x, heads):
        x = self.dirty(x)
        q, k, v = self.linear(f"{name}.qkv", x).flatten(2).unflatten(1, (heads, 3, -1)).unbind(2)  # (b h d n)
        logits = torch.einsum("bhdi,bhdj->bhij", q, k) * q.shape[2] ** -0.5
        if "keys" in self.masks:
            logits = logits.masked_fill(~self.keep(x).flatten(2)[:, :, None], -torch.inf)
        out = torch.einsum("bhij,bhdj->bhdi", logits.softmax(-1), v)
        return self.linear(f"{name}.proj", out.flatten(1, 2).unflatten(2, x.shape[-2:]))

    def super_tokens(self, name, x, heads, c):
        h, w = x.shape[-2:]
        x = self.dirty(x)
        if "association" in self.masks:
            x = x * self.keep(x)
        x = F.pad(x, (0, -w % c, 0, -h % c))
        hh, ww, d = x.shape[-2] // c, x.shape[-1] // c, x.shape[1]
        supers = F.avg_pool2d(x, c)
        tokens = rearrange(x, "b d (hh i) (ww j) -> b (hh ww) (i j) d", i=c, j=c)

        def near(s):
            return F.unfold(s, 3, padding=1).unflatten(1, (d, 9)).permute(0, 3, 1, 2)  # (b n d 9)

        association = (tokens @ near(supers) * d**-0.5).softmax(-1).detach()
        if "association" in self.masks:
            keep = self.keep(supers).double()
            around = F.unfold(keep, 3, padding=1).mT[:, :, None]  # (b n 1 9)
            # positions beyond the border are handled by fold and unfold, not by the mask
            inside = F.unfold(torch.ones_like(keep), 3, padding=1).mT[:, :, None]
            association = association * keep.flatten(2).mT[..., None] * torch.where(inside > 0, around, 1.0)
        update = (tokens.mT @ association).permute(0, 2, 3, 1).flatten(1, 2)  # (b d*9 n)
        mass = association.sum(2).mT
        fold = {"output_size": (hh, ww), "kernel_size": 3, "padding": 1}
        supers = F.fold(update, **fold) / (F.fold(mass, **fold) + 1e-12)
        supers = self.attend(name, supers, heads)
        if "association" in self.masks:
            supers = self.dirty(supers)
        out = association @ near(supers).mT  # (b n c*c d)
        return rearrange(out, "b (hh ww) (i j) d -> b d (hh i) (ww j)", hh=hh, i=c)[..., :h, :w]

    def gamma(self, name):
        return self.state.get(name, torch.ones(()))

    def __call__(self, x):
        """(b c H W) -> (b tail h w), or without a tail (b d h w) if there is a mask"""
        for i, stride in enumerate(self.strides):
            x = F.gelu(self.conv(f"patch_embed.proj.{3 * i}", x, stride))
            x = self.batch_norm(f"patch_embed.proj.{3 * i + 2}", x)
        for s, (heads, cell) in enumerate(zip(self.heads, (8, 4, 1, 1), strict=True)):
            i = 0
            while f"layers.{s}.blocks.{i}.norm2.weight" in self.state:
                name = f"layers.{s}.blocks.{i}"
                x = x + self.conv(f"{name}.pos_embed.conv", x)
                weight, bias = (self.state[f"{name}.norm1.norm.{k}"] for k in ("weight", "bias"))
                y = F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, 1e-6).movedim(-1, 1)
                attention = f"{name}.attn.stoken_refine"
                y = self.attend(attention, y, heads) if cell == 1 else self.super_tokens(attention, y, heads, cell)
                x = x + self.gamma(f"{name}.gamma_1") * y
                y = F.gelu(self.linear(f"{name}.mlp2.fc1", self.batch_norm(f"{name}.norm2", x)))
                y = self.linear(f"{name}.mlp2.fc2", y + self.conv(f"{name}.mlp2.conv.conv", y))
                x = x + self.gamma(f"{name}.gamma_2") * y
                i += 1
            if s < 3:
                x = self.conv(f"layers.{s}.downsample.proj.0", x, 2)
                x = self.batch_norm(f"layers.{s}.downsample.proj.1", x)
        return x if self.kept is not None else F.silu(self.batch_norm("norm", self.linear("proj", x)))
