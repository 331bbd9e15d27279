"""Feature pyramids of all kinds of backbones, and attention windows for large images."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import BACKBONES, PLAIN, backbone, fill, joined
from hypothesis import given, settings
from hypothesis import strategies as st

from mimkit.conversion.verify import difference
from mimkit.errors import UserError
from mimkit.models import hivit, hpvit
from mimkit.models.feature_pyramid import NECKS, Pyramid
from mimkit.models.layers import windows
from mimkit.models.layers.windows import into_windows, out_of_windows, window_sides, windowed_map
from mimkit.tasks.segmentation import Segmenter

DEEP = {  # networks of 8 blocks: each quarter has a block in windows and a global one
    "hivit_nano": {"depths": (1, 1, 8)},
    "hivit_nano without biases": {"depths": (1, 1, 8), "unit_form": True},
    "hpvit": {"source_args": {"embed_dim": 32, "depth": 8, "num_heads": 2}, "depths": "0-1-7-0"},
    "hpvit coarse": {"source_args": {"embed_dim": 32, "depth": 8, "num_heads": 2}, "depths": "coarse"},
    "vit_tiny_patch16_224": PLAIN | {"depth": 8},
    "vit_tiny_patch16_224 with registers": PLAIN | {"depth": 8, "reg_tokens": 2, "init_values": 1e-5},
}


def deep(name, window=0):
    """Build a pyramid in float64 whose weights do not depend on the window."""
    torch.manual_seed(0)
    return joined(Pyramid(fill(timm.create_model(name.split()[0], **DEEP[name])), window=window)).double().eval()


# The pyramid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_gives_four_maps_and_gradients(name):
    for neck in NECKS:
        if name.startswith("vit") and neck in ("maps", "both"):
            with pytest.raises(UserError, match=r"needs maps at 4, 8 and 16 px; vit_tiny.*pass --neck pyramid"):
                Pyramid(backbone(name), neck)
            continue
        pyramid = joined(Pyramid(backbone(name), neck))
        x = torch.randn(2, 3, 90, 64)
        maps = pyramid(x)
        height, width = (side + -side % pyramid.multiple for side in x.shape[-2:])
        patch = 14 if "/14" in name else 16
        strides = [patch / 4, patch / 2, patch, 2 * patch]
        assert [tuple(m.shape[1:]) for m in maps] == [
            (c, round(height / s), round(width / s)) for c, s in zip(pyramid.channels, strides, strict=True)
        ]
        sum((m * torch.randn_like(m)).sum() for m in maps).backward()
        assert not [n for n, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()], neck


def test_an_hpvit_starts_as_the_pyramid_of_its_plain_vit():
    """Check that the added finer maps change nothing before training, and get gradients in the first step."""
    net = fill(timm.create_model("hpvit", **DEEP["hpvit"]))
    for pool in net.pools[:2]:
        pool.reset_parameters()
    plain = hpvit.plain_vit("vit_base_patch16_224", 16, any_grid=True, **DEEP["hpvit"]["source_args"])
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("pools.")})
    theirs, ours = Pyramid(plain).double().eval(), Pyramid(net).double().eval()
    assert (theirs.neck, ours.neck) == ("pyramid", "both")
    ours.up.load_state_dict(theirs.up.state_dict())
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for a, b in zip(ours(x), theirs(x), strict=True):
        assert difference(a, b) < 1e-12
    ours(x)[0].sum().backward()
    assert ours.side[0].weight.grad.any()
    torch.nn.init.normal_(ours.side[0].weight)
    assert difference(ours(x)[0], theirs(x)[0]) > 1e-3


@pytest.mark.parametrize(("depths", "neck"), [("0-1-2-0", "both"), ("1-1-0-1", "maps"), ("0-0-0-3", "maps")])
def test_the_default_neck_keeps_all_blocks_of_an_hpvit(depths, neck):
    pyramid = Pyramid(backbone("hpvit", depths=depths))
    assert (pyramid.neck, len(pyramid.backbone.blocks)) == (neck, 3)
    assert len(Pyramid(backbone("hpvit", depths=depths), "both").backbone.blocks) == 3 - int(depths[-1])


@pytest.mark.parametrize("name", [n for n in (*BACKBONES, *DEEP) if n != "resnet18"])
def test_maps_of_an_image_do_not_depend_on_its_batch(name):
    """Compare a batch of padded images with the same images one by one. The deep networks have windows."""
    pyramid = deep(name, window=4).float() if name in DEEP else Pyramid(backbone(name)).eval()
    images = [torch.randn(3, 64, 96), torch.randn(3, 96, 80)]
    padded = torch.stack([F.pad(image, (0, 96 - image.shape[2], 0, 96 - image.shape[1])) for image in images])
    together = pyramid(padded)
    for i in range(2):
        for one, both in zip(pyramid(padded[i : i + 1]), together, strict=True):
            assert torch.allclose(one[0], both[i], atol=1e-4)
    # padding changes the maps, as in any network that attends to it or convolves over it (docs/segmentation.md)
    alone = pyramid(images[0][None])[2][0]
    assert not torch.allclose(alone, together[2][0][:, : alone.shape[1], : alone.shape[2]], atol=1e-4)


def test_backbones_without_a_pyramid_are_refused():
    with pytest.raises(UserError, match="--neck nose is unknown"):
        Pyramid(backbone("hivit_nano"), "nose")
    with pytest.raises(UserError, match="resnet26's are at 2, 4, 8: pass --neck pyramid"):
        Pyramid(timm.create_model("resnet26", output_stride=8))
    for name in ("hivit_nano", "svit_nano"):
        with pytest.raises(UserError, match=r"are at 2, 4, 8.*: pass --model-args\.patch_size 4"):
            Pyramid(backbone(name, patch_size=2))
    with pytest.raises(UserError, match="Choose upernet, or fpn"):
        Segmenter(backbone("hivit_nano"), 3, "fpn", 40)


# Windows -------------------------------------------------------------------------------------------------------------

SIDES = st.integers(1, 9)


@given(SIDES, SIDES, st.integers(1, 6), st.integers(0, 2), st.integers(1, 2))
def test_windows_cover_a_grid_and_can_be_undone(height, width, window, k, batch):
    grid = height, width
    h, w = sides = window_sides(grid, window)
    assert max(sides) <= window
    counts = [-(-height // window), -(-width // window)]  # the smallest possible number of windows
    assert [-(-height // h), -(-width // w)] <= counts
    x = torch.randn(batch, k + height * width, 3)
    cut, mask = into_windows(x, grid, sides, k)
    assert torch.equal(out_of_windows(cut, grid, sides, k)[:, k:], x[:, k:])
    torch.testing.assert_close(out_of_windows(cut, grid, sides, k)[:, :k], x[:, :k])
    if mask is None:
        assert cut.numel() == x.numel() + (len(cut) - batch) * k * 3
        return
    seen = mask[:, 0, 0] == 0
    assert seen[:, :k].all()
    assert seen[:, k:].any(1).all()  # a window of padding only would have undefined attention
    assert seen[:, k:].sum() == batch * height * width
    assert not cut[~seen].any()
    assert (mask[:, 0, 0][~seen] < -1e38).all()


@pytest.mark.parametrize("name", DEEP)
@torch.no_grad()
def test_a_window_of_the_whole_map_changes_nothing(name):
    x = torch.randn(2, 3, 96, 160, dtype=torch.float64)  # 6 x 10 tokens
    whole = deep(name)(x)
    for window in (10, 16):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(deep(name, window)(x), whole, strict=True))
    assert difference(deep(name, 9)(x)[2], whole[2]) > 1e-3


@pytest.mark.parametrize("name", DEEP)
@torch.no_grad()
def test_only_the_last_block_of_each_quarter_is_global(name):
    """Disable attention in all blocks but one, and check whether a change in one corner reaches the opposite one."""
    x = torch.randn(1, 3, 96, 160, dtype=torch.float64)
    changed = x.clone()
    changed[..., :16, :16] += 1
    reached = []
    for i in range(8):
        pyramid = deep(name, 4)
        blocks = [block for block in pyramid.backbone.blocks if hasattr(block, "attn")]
        for block in blocks[:i] + blocks[i + 1 :]:
            for parameter in block.attn.proj.parameters():
                parameter.zero_()
        ours, theirs = (pyramid(image)[2][0] for image in (x, changed))
        assert (ours - theirs)[:, 0, 0].abs().max() > 1e-3
        reached.append(bool((ours - theirs)[:, -1, -1].abs().max() > 1e-9))
    assert reached == [False, True] * 4


@pytest.mark.parametrize("name", DEEP)
@torch.no_grad()
def test_the_mask_hides_the_padding_of_windows(name, monkeypatch):
    """Remove the mask from windows of 3 x 4 on 6 x 10 tokens, and check that attention to zeros changes the map."""
    x = torch.randn(1, 3, 96, 160, dtype=torch.float64)
    pyramid = deep(name, 4)
    masked = pyramid(x)[2]
    for module in (windows, hivit, hpvit):
        monkeypatch.setattr(module, "into_windows", lambda *args: (into_windows(*args)[0], None))
    assert difference(pyramid(x)[2], masked) > 1e-3


@settings(max_examples=20, deadline=None)
@given(SIDES, SIDES, st.integers(1, 5))
@torch.no_grad()
def test_windows_of_a_plain_vit_equal_masked_attention(height, width, window):
    """Compare with an explicit mask (n n). Prefix tokens attend to one window at a time, and are averaged over them."""
    vit = deep("vit_tiny_patch16_224 with registers").backbone
    x = torch.randn(1, 3, 16 * height, 16 * width, dtype=torch.float64)
    h, w = window_sides((height, width), window)
    owners = torch.tensor([(i // w) + width * (j // h) for j in range(height) for i in range(width)])
    k, tokens = 3, vit._pos_embed(vit.patch_embed(x))
    for i, block in enumerate(vit.blocks):
        if i % 2:
            tokens = block(tokens)
            continue
        prefix = []
        for owner in owners.unique():
            allowed = torch.ones(k + len(owners), k + len(owners), dtype=torch.bool)
            allowed[k:, k:] = owners[:, None] == owners
            allowed[:k, k:] = owners == owner
            after = block(tokens, attn_mask=allowed)
            prefix.append(after[:, :k])
        tokens = torch.cat([torch.stack(prefix).mean(0), after[:, k:]], dim=1)
    expected = tokens[:, k:].transpose(1, 2).reshape(1, -1, height, width)
    torch.testing.assert_close(windowed_map(vit, x, window), expected)


@pytest.mark.parametrize("name", DEEP)
def test_windows_with_gradient_checkpointing_and_two_input_sizes(name):
    """Run two input sizes before the backward pass: recomputation must not depend on state stored in the network."""
    x, other = (torch.randn(1, 3, *size, dtype=torch.float64) for size in ((96, 160), (160, 64)))
    pyramid, gradients = deep(name, 4).train(), []
    for recomputed in (False, True):
        pyramid.backbone.set_grad_checkpointing(recomputed)
        pyramid.zero_grad()
        sum((m * m.detach().roll(1)).sum() for image in (x, other) for m in pyramid(image)).backward()
        gradients.append({n: p.grad for n, p in pyramid.named_parameters() if p.requires_grad})
    assert not [n for n, gradient in gradients[0].items() if gradient is None or not gradient.any()]
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], gradient, msg=n)
    again = copy.deepcopy(pyramid)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again(x), pyramid(x), strict=True))
    assert set(deep(name).state_dict()) == set(pyramid.state_dict())


def test_a_pyramid_keeps_the_windows_of_its_backbone_by_default():
    net = timm.create_model("hpvit", **DEEP["hpvit"], window=3)
    assert Pyramid(net).backbone.window == 3
    assert Pyramid(net, window=5).backbone.window == 5
    assert net._model_args["window"] == 5
    assert list(net.global_blocks) == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("svit_nano", {}),
        ("swin_tiny_patch4_window7_224", BACKBONES["swin_tiny_patch4_window7_224"]),
        ("eva02_tiny_patch14_224", {"depth": 1}),
        ("samvit_base_patch16", {"depth": 1, "embed_dim": 32, "num_heads": 2}),
    ],
)
def test_windows_are_refused_for_other_networks(name, options):
    with pytest.raises(UserError, match=f"--window is for HiViT, HPViT and VisionTransformer, and {name} is a"):
        Pyramid(timm.create_model(name, **options), window=4)
