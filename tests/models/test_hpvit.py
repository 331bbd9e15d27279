"""HPViT: it starts as the plain ViT, for each kind of plain ViT in timm, and behaves as a timm network."""

import copy
import json
import math
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import fill
from einops import rearrange, repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.pos_embed_sincos import get_mixed_freqs
from timm.optim import param_groups_layer_decay

from mimkit.conversion.verify import difference, tokens_after
from mimkit.errors import UserError
from mimkit.io.weights import write_model
from mimkit.models.hpvit import beit_relative_bias, beit_relative_index, midpoints, plain_vit, resolve_depths

TINY = {"depth": 4, "embed_dim": 48, "num_heads": 3}
KINDS = {  # one architecture for each kind of block, position embedding and prefix token in timm
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch14_dinov2": {"img_size": 98},
    "vit_small_patch14_reg4_dinov2": {"img_size": 98},
    "vit_small_patch8_224": {"img_size": 64},
    "vit_small_patch32_224": {},
    "vit_base_patch16_rpn_224": {},
    "vit_small_patch16_18x2_224": {},
    "vit_base_patch16_xp_224": {"num_heads": 6},
    "vit_dpwee_patch16_reg1_gap_256": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
    "eva02_tiny_patch14_336": {"img_size": 98},
    "eva_giant_patch14_224": {"img_size": 98},
    "vit_pe_core_tiny_patch16_384": {"img_size": 112},
    "beit_base_patch16_224": {"img_size": 112},
    "samvit_base_patch16": {"img_size": 112, "window_size": 3, "global_attn_indexes": (1, 3)},
}
FAMILIES = ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224", "samvit_base_patch16"]


def pyramid(name="vit_tiny_patch16_224", depths="1-1-2-0", **options):
    """Build an HPViT with every tensor at order 1, except for pools with their initial weights."""
    arguments = {**TINY, **KINDS.get(name, {}), **options.pop("source_args", {})}
    net = fill(timm.create_model("hpvit", source=name, source_args=arguments, depths=depths, **options)).eval()
    for pool in net.pools:
        if hasattr(pool, "reset_parameters"):
            pool.reset_parameters()
    return net, arguments


def plain(net, name, arguments, **options):
    """Build timm's plain ViT with the same weights and a kernel of 16 px."""
    source = plain_vit(name, 16, any_grid=True, **{**arguments, **options}).eval()
    source.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("pools.")})
    return source


@torch.no_grad()
def gaps(net, source, x):
    """Return the relative differences from the plain ViT: after stage 3, of the final tokens, and of the logits."""
    depth = sum(net.depths[:3])
    padded = F.pad(x, (0, -x.shape[-1] % 16, 0, -x.shape[-2] % 16))
    tokens, final = tokens_after(source, padded, depth)
    differences = [difference(net.stages(x, 2)[-1][0], tokens)]
    if not net.depths[3]:
        differences += [difference(net.forward_features(x), final), difference(net(x), source.forward_head(final))]
    return differences


@pytest.mark.parametrize("name", KINDS)
def test_starts_as_the_plain_vit(name):
    """Compare with timm's plain ViT. As a negative control, a wrong tap in the first pool must change the output."""
    net, arguments = pyramid(name)
    net, source = net.double(), plain(net, name, arguments).double()
    x = torch.randn(2, *net.pretrained_cfg["input_size"], dtype=torch.float64)
    assert max(gaps(net, source, x)) < 1e-9
    net.pools[0].weight.data = net.pools[0].weight.data.flip(-1)  # a wrong tap
    assert min(gaps(net, source, x)) > 1e-3


@pytest.mark.parametrize("depths", ["0-1-3-0", "2-0-2-0", "0-0-4-0", "1-1-1-1", "4-0-0-0", "0-0-0-4"])
@pytest.mark.parametrize("padding", [(4, 8), (8, 4), (0, 12)])
def test_starts_as_the_plain_vit_with_any_depths_and_padding(depths, padding):
    net, arguments = pyramid(depths=depths, padding=padding)
    source = plain(net, "vit_tiny_patch16_224", arguments)
    assert max(gaps(net.double(), source.double(), torch.randn(1, 3, 64, 64, dtype=torch.float64))) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(240, 240), (592, 592), (100, 180)])
def test_starts_as_the_plain_vit_at_any_size(name, size):
    options = {"depths": "0-1-1-0", "source_args": {"depth": 2}} if size[0] > 500 else {}
    net, arguments = pyramid(name, **options)
    source = plain(net, name, arguments).double()
    if name.startswith("beit"):  # timm's BEiT runs on one size, to which its tables are resized here
        source.set_input_size([-(-side // 16) * 16 for side in size])
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    assert max(gaps(net.double(), source, x)) < 1e-9
    cells = [-(-side // 16) for side in size]
    with torch.no_grad():
        shapes = [m.shape[2:] for m in net.forward_intermediates(x, intermediates_only=True)]
    expected = [(4 * cells[0], 4 * cells[1]), (2 * cells[0], 2 * cells[1]), tuple(cells)]
    assert [tuple(s) for s in shapes] == [*expected, tuple(-(-c // 2) for c in cells)]


@pytest.mark.parametrize("in_chans", [1, 4])
def test_starts_as_the_plain_vit_with_other_channels(in_chans):
    net, arguments = pyramid(in_chans=in_chans)
    source = plain(net, "vit_tiny_patch16_224", arguments, in_chans=in_chans)
    assert max(gaps(net.double(), source.double(), torch.randn(1, in_chans, 64, 96, dtype=torch.float64))) < 1e-12


@torch.no_grad()
def test_the_third_pool_starts_as_the_mean_of_valid_tokens():
    net, _ = pyramid()
    third, fourth = net.forward_intermediates(torch.randn(1, 3, 48, 80), indices=[2, 3], intermediates_only=True)
    assert fourth.shape[2:] == (2, 3)
    torch.testing.assert_close(fourth[..., 0, 0], third[..., :2, :2].mean((2, 3)))
    torch.testing.assert_close(fourth[..., 1, 2], third[..., 2, 4])
    torch.testing.assert_close(fourth[..., 1, 0], third[..., 2, :2].mean(2))
    stage3, stage4 = pyramid(depths="1-1-2-0")[0].stages(torch.randn(1, 3, 48, 80))[2:]
    torch.testing.assert_close(stage3[0][:, 0], stage4[0][:, 0])  # the pool leaves the class token unchanged
    learned, _ = pyramid(depths="1-1-1-1")
    x = torch.randn(1, 3, 48, 80)
    mean, _ = pyramid(depths="1-1-1-1", pool="avg")
    mean.load_state_dict({k: v for k, v in learned.state_dict().items() if not k.startswith("pools.")})
    mean.pools[0], mean.pools[1] = learned.pools[0], learned.pools[1]
    torch.testing.assert_close(learned(x), mean(x))


@torch.no_grad()
def test_all_kinds_of_pools_start_with_the_same_output():
    x = torch.randn(1, 3, 64, 64)
    for init in ("aligned", 0.5, "average"):
        depthwise, _ = pyramid(pool_init=init)
        dense, _ = pyramid(pool="conv", pool_init=init)
        shared = {k: v for k, v in depthwise.state_dict().items() if not k.startswith("pools.")}
        dense.load_state_dict({**dense.state_dict(), **shared})
        torch.testing.assert_close(depthwise(x), dense(x), rtol=1e-4, atol=1e-5)
    mean, _ = pyramid(pool="avg")
    mean.load_state_dict(shared)
    torch.testing.assert_close(depthwise(x), mean(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_window_as_large_as_the_grid_changes_nothing():
    options = {"source_args": {"depth": 8}, "depths": "1-1-6-0"}
    net, _ = pyramid(**options)
    windowed, _ = pyramid(window=6, **options)
    windowed.load_state_dict(net.state_dict())
    assert list(windowed.global_blocks) == [1, 3, 5, 7]
    x, larger = torch.randn(1, 3, 96, 96), torch.randn(1, 3, 112, 112)
    assert torch.equal(net(x), windowed(x))
    assert difference(net(larger), windowed(larger)) > 1e-3


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
@torch.no_grad()
def test_a_window_attends_to_itself_and_the_prefix_tokens_only(name):
    net, arguments = pyramid(name, depths="0-0-8-0", window=3, source_args={"depth": 8})
    net, source = net.double(), plain(net, name, arguments).double()
    x = torch.randn(1, 3, 96, 80, dtype=torch.float64)  # 6 x 5 tokens: windows of 3 x 3, padded in the last column
    first, tokens = [], net.stages(x, 1)[-1][0]  # the embedding after one pool, before any block
    tokens = net.merge(tokens, 1, (6, 5))[0]
    rope = net.enter(net.embed(x))[1]
    k = net.num_prefix_tokens
    ours = net.run_block(0, tokens, (6, 5), rope)
    maps = tokens[:, k:].reshape(1, 6, 5, -1)
    for rows, columns in ((slice(0, 3), slice(0, 3)), (slice(3, 6), slice(3, 5))):
        piece = torch.cat([tokens[:, :k], maps[:, rows, columns].flatten(1, 2)], dim=1)
        places = torch.arange(30).reshape(6, 5)[rows, columns].flatten()
        kwargs = {}
        if rope is not None:
            kwargs["rope"] = rope[places]
        if net.beit:
            source.set_input_size((96, 80))
            chosen = torch.cat([torch.zeros(1, dtype=torch.long), 1 + places])
            attention = source.blocks[0].attn
            bias = attention._get_rel_pos_bias()[:, :, chosen][..., chosen]
            attention._get_rel_pos_bias = lambda bias=bias: bias
        theirs = source.blocks[0](piece, **kwargs)
        got = ours[:, k:].reshape(1, 6, 5, -1)[:, rows, columns].flatten(1, 2)
        torch.testing.assert_close(got, theirs[:, k:], rtol=1e-6, atol=1e-7)
        first.append(theirs[:, :k])
        if net.beit:
            del attention._get_rel_pos_bias
    assert len(first) == 2


@torch.no_grad()
def test_local_windows_of_tiled_tokens_equal_the_source():
    """Tile the map from the source's tokens and positions, and check that every window equals the source."""
    net, arguments = pyramid(depths="4-0-0-0", attention="local")
    source = plain(net, "vit_tiny_patch16_224", arguments)
    tokens = torch.randn(1, 14, 14, 48)
    ours = net.enter(repeat(tokens, "1 h w d -> (n k) h w d", n=4, k=4))[0]
    for block in net.blocks:
        ours = block(ours)
    theirs = source.blocks(source._pos_embed(tokens))
    torch.testing.assert_close(ours, theirs.expand_as(ours), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(6, 6), (7, 9), (14, 14)])
def test_rope_after_the_third_pool_is_at_the_midpoints(size):
    """Compare with each kind of RoPE at the coordinates 2 i + 0.5, by its own formula."""
    h, w = size
    ys, xs = ([2 * i + (0.5 if 2 * i + 1 < n else 0.0) for i in range(-(-n // 2))] for n in size)
    y, x = (t.flatten() for t in torch.meshgrid(torch.tensor(ys), torch.tensor(xs), indexing="ij"))

    def ours(rope, embedding):
        return midpoints(rearrange(embedding, "... (h w) d -> ... h w d", h=h)).flatten(-3, -2)

    dinov3 = timm.create_model("vit_small_patch16_dinov3", **TINY).rope
    coordinates = torch.stack([2 * (y + 0.5) / h - 1, 2 * (x + 0.5) / w - 1], dim=-1)
    theirs = torch.cat(dinov3._get_pos_embed_from_coords(coordinates), dim=-1)
    torch.testing.assert_close(ours(dinov3, dinov3.get_embed(size)), theirs, rtol=0, atol=2e-5)

    mixed = timm.create_model("vit_small_patch16_rope_mixed_224", **TINY, dynamic_img_size=True).rope
    assert mixed.grid_indexing == "xy"
    theirs = get_mixed_freqs(mixed.freqs, x, y)
    torch.testing.assert_close(ours(mixed, mixed.get_embed(size)), theirs, rtol=0, atol=2e-5)

    eva = timm.create_model("eva02_tiny_patch14_336", **TINY, dynamic_img_size=True).rope
    scale = [16 / n for n in size]  # timm's ref_feat_shape
    angles = torch.cat([(y * scale[0])[:, None] * eva.bands, (x * scale[1])[:, None] * eva.bands], dim=-1)
    theirs = torch.cat([angles.sin().repeat_interleave(2, -1), angles.cos().repeat_interleave(2, -1)], dim=-1)
    torch.testing.assert_close(ours(eva, eva.get_embed(size)), theirs, rtol=0, atol=2e-5)


def test_relative_tables_after_the_third_pool_are_at_even_offsets():
    table = torch.randn(13 * 13 + 3, 3)
    index = beit_relative_index((7, 7), (7, 7), 2, 1, table.device)
    bias = beit_relative_bias(table, (7, 7), (7, 7), index)
    for i in range(16):
        for j in range(16):
            dy, dx = 2 * (i // 4 - j // 4), 2 * (i % 4 - j % 4)
            assert torch.equal(bias[0, :, 1 + i, 1 + j], table[(dy + 6) * 13 + dx + 6])
    assert torch.equal(bias[0, :, 0, 5], table[-3])
    assert torch.equal(bias[0, :, 5, 0], table[-2])
    assert torch.equal(bias[0, :, 0, 0], table[-1])


def test_every_parameter_and_every_tap_gets_a_gradient():
    net, _ = pyramid(depths="1-1-1-1")
    net(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    for pool in net.pools:
        assert (pool.weight.grad != 0).all()
    for name in ("vit_small_patch16_dinov3", "beit_base_patch16_224"):
        net, _ = pyramid(name)
        net(torch.randn(1, 3, 64, 64)).sum().backward()
        assert [n for n, p in net.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_prefix_tokens_can_be_dropped():
    net, arguments = pyramid(prefix="drop")
    x = torch.randn(1, 3, 64, 64)
    assert [tokens.shape[1] for tokens, _ in net.stages(x)] == [16, 16, 16, 4]
    features = net.forward_features(x)
    torch.testing.assert_close(features[:, 0], features[:, 1:].mean(1))
    assert net(x).shape == (1, 1000)
    assert difference(net(x), plain(net, "vit_tiny_patch16_224", arguments)(x)) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_behaves_as_a_timm_network(name):
    net, arguments = pyramid(name)
    source = timm.create_model(name, **arguments)
    own = set(net.state_dict())
    assert {n for n in own if not n.startswith("pools.")} == set(source.state_dict())
    assert {n for n in own if n.startswith("pools.")} == {"pools.0.weight", "pools.1.weight"}
    assert net.no_weight_decay() >= {"pools.0.weight", "pools.1.weight", "pos_embed"} & own | set()
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        y = net(x)
        again = copy.deepcopy(net)
        assert again.source._parameters is again._parameters
        assert torch.equal(again(x), y)
        maps = timm.create_model(
            "hpvit", source=name, source_args=arguments, depths="1-1-2-0", features_only=True, out_indices=(1, 2)
        )
        maps.model.load_state_dict({k: v for k, v in net.state_dict().items() if k in maps.model.state_dict()})
        assert maps.feature_info.reduction() == [8, 16]
        for ours, theirs in zip(
            maps.eval()(x), net.forward_intermediates(x, [1, 2], intermediates_only=True), strict=True
        ):
            assert torch.equal(ours, theirs)
        final, _ = net.forward_intermediates(x)
        assert torch.equal(final, net.forward_features(x))
    net.reset_classifier(7)
    assert net(x).shape == (2, 7)
    assert net.num_classes == 7
    net.train()
    assert net.source.training
    net.set_grad_checkpointing()
    grads = []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        net.zero_grad()
        net(x).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-6) for n in grads[0])


@pytest.mark.parametrize(
    ("name", "pool"),
    [("vit_tiny_patch16_224", "avg"), ("vit_base_patch16_siglip_224", "avg"), ("beit_base_patch16_224", "token")],
)
def test_another_pooling_survives_a_round_trip(name, pool, tmp_path):
    net, _ = pyramid(name)
    net.reset_classifier(5, pool)
    write_model(net, tmp_path / "model")
    again = timm.create_model(f"local-dir:{tmp_path}/model", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(x), net(x), rtol=1e-4, atol=1e-5)


def test_config_stores_default_arguments_too(tmp_path):
    """Check that a saved network does not depend on defaults, which may change."""
    net = timm.create_model("hpvit", source="vit_tiny_patch16_224", source_args=TINY)
    write_model(net, tmp_path / "model")
    args = json.loads((tmp_path / "model" / "config.json").read_text())["model_args"]
    assert args["source"] == "vit_tiny_patch16_224"
    assert (args["depths"], args["padding"], args["pool"], args["prefix"]) == ([0, 0, 4, 0], [4, 8], "dw", "keep")


def test_small_grids_are_refused_with_rope_after_the_third_pool():
    net, _ = pyramid("vit_pe_core_tiny_patch16_384", depths="1-1-1-1")
    with pytest.raises(UserError, match="128 px or more"):
        net(torch.randn(1, 3, 96, 96))
    net(torch.randn(1, 3, 128, 128))


def test_device_and_precision():
    net = timm.create_model("hpvit", source="vit_tiny_patch16_224", source_args=TINY, dtype=torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    for name in ("vit_tiny_patch16_224", "beit_base_patch16_224", "vit_small_patch16_dinov3"):
        net, _ = pyramid(name, window=3, depths="1-1-2-0")
        with torch.autocast("cpu", torch.bfloat16):
            assert net(torch.randn(1, 3, 112, 112)).isfinite().all()


def test_layer_decay_groups():
    net, _ = pyramid(depths="1-1-2-0")
    groups = param_groups_layer_decay(net, layer_decay=0.5, no_weight_decay_list=net.no_weight_decay())
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    of = {name: math.log2(scale[id(p)]) for name, p in net.named_parameters()}
    assert of["head.weight"] == 0
    assert of["blocks.3.mlp.fc1.weight"] - of["blocks.0.mlp.fc1.weight"] == 3
    assert of["pools.0.weight"] == of["blocks.1.mlp.fc1.weight"]
    assert of["pools.1.weight"] == of["blocks.2.mlp.fc1.weight"]
    assert of["patch_embed.proj.weight"] == of["cls_token"] == of["blocks.0.mlp.fc1.weight"] - 1


REBUILD = """
import sys, timm, torch, mimkit
for name in sys.argv[1:]:
    print(name, file=sys.stderr)  # names the family that fails
    x, y = torch.load(f"{name}.pt")
    net = timm.create_model(f"local-dir:{name}", pretrained=True).eval()
    assert list(net.pretrained_cfg["mean"]) == [0.1, 0.2, 0.3]
    assert not net.pretrained_cfg["fixed_input_size"]
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)
    other = timm.create_model(f"local-dir:{name}", pretrained=True, num_classes=3, in_chans=1)
    assert other(x[:, :1]).shape == (1, 3)
"""


@pytest.mark.slow
def test_a_fresh_process_rebuilds_it_from_a_folder(tmp_path):
    for name in FAMILIES:
        net, _ = pyramid(name, depths="1-1-2-0", num_classes=5)
        x = torch.randn(1, 3, 96, 64)
        write_model(net, tmp_path / name, mean=(0.1, 0.2, 0.3))
        torch.save((x, net(x).detach()), tmp_path / f"{name}.pt")
    done = subprocess.run([sys.executable, "-c", REBUILD, *FAMILIES], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_named_sizes_and_input_sizes():
    for name, width, side in (("s", 384, 224), ("b", 768, 224), ("l", 1024, 224), ("h", 1280, 256)):
        with torch.device("meta"):
            net = timm.create_model(f"hpvit_{name}")
        assert (net.embed_dim, net.pretrained_cfg["input_size"]) == (width, (3, side, side))
    with pytest.raises(UserError, match="choose hpvit_s"), torch.device("meta"):
        timm.create_model("hpvit_b", source="vit_small_patch14_dinov2")
    with pytest.raises(UserError, match="choose hpvit_s"), torch.device("meta"):
        timm.create_model("hpvit_b", embed_dim=384, num_heads=6)
    inputs = {"vit_large_patch14_clip_224": 256, "vit_base_patch8_224": 448, "vit_base_patch32_224": 112}
    for source, side in inputs.items():
        with torch.device("meta"):
            net = timm.create_model("hpvit", source=source)
        assert net.pretrained_cfg["input_size"] == (3, side, side)


@given(st.integers(4, 48), st.data())
@settings(max_examples=30, deadline=None)
def test_resolve_depths(total, data):
    first, second = data.draw(st.integers(0, total)), data.draw(st.integers(0, total))
    split = (first, second, total - first - second, 0)
    if split[2] < 0:
        with pytest.raises(UserError, match="do not split"):
            resolve_depths(split, total)
    else:
        assert resolve_depths(split, total) == resolve_depths("-".join(map(str, split)), total) == split
    assert sum(resolve_depths("light", total)) == sum(resolve_depths("coarse", total)) == total
    with pytest.raises(UserError, match="0-1-"):
        resolve_depths("cheap", total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": "1-1-1-0"}, "do not split 4 blocks"),
        ({"pool": "max"}, "pool 'max' is unknown"),
        ({"pool_init": "tap"}, "pool_init 'tap' is unknown"),
        ({"pool_init": 1.5}, "pool_init 1.5"),
        ({"attention": "global"}, "attention 'global'"),
        ({"padding": (6, 6)}, "padding"),
        ({"prefix": "some"}, "prefix 'some'"),
        ({"padding": 4}, "padding"),
        ({"depths": 4}, "depths 4 do not split"),
        ({"window": -1}, "window -1 is negative"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ({"source": "resnet50"}, "not a plain ViT"),
        ({"source": "vit_base_r50_s16_224"}, "not by patches"),
        ({"source": "vit_nowhere"}, "cannot be built"),
        ({"source": "samvit_base_patch16_224", "depths": "1-1-1-1"}, "samvit_base_patch16_224 has windows"),
        ({"source": "samvit_base_patch16_224", "window": 4}, "has windows"),
    ],
)
def test_wrong_options_are_refused(options, message):
    source = options.pop("source", "vit_tiny_patch16_224")
    arguments = TINY if source.startswith(("vit_tiny", "sam")) else {}
    with pytest.raises(UserError, match=message):
        timm.create_model("hpvit", source=source, source_args=arguments, **options)
