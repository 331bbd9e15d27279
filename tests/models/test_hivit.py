"""HiViT: published sizes, skipping of units, windows, and its behavior as a timm network."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import fill
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from timm.models import group_parameters
from torch import nn

from mimkit.errors import UserError
from mimkit.flops import count_gmacs, gmacs_of
from mimkit.io.weights import write_model
from mimkit.models.hivit import Merge, StemBlock, UnitPatchEmbed, checkpoint_filter_fn, resample_bias_table
from mimkit.models.layers.windows import window_sides
from mimkit.models.pretrained import load_network
from mimkit.units import gather, sample_mask, serialize

NAMES = timm.list_models("hivit_*")
# t is s without 2 + 2 stem blocks and 10 main blocks, which have 18,344,796 parameters
MILLIONS = {"t": 19.181668, "s": 37.526464, "b": 66.418952, "b24": 79.051816, "l": 290.712328}
GMACS = {"t": 4.587, "s": 9.044, "b": 15.810, "b24": 18.433, "l": 63.892}
PUBLISHED = {"t": 4.60, "s": 9.07, "b": 15.85, "b24": 18.47}
SMALL = {"img_size": 32, "patch_size": 1}


def unit_form(name="hivit_nano", **options):
    """Build a HiViT for masked pre-training on 8 x 8 units of 4 px."""
    return timm.create_model(name, num_classes=0, unit_form=True, **(SMALL | options)).eval()


@pytest.fixture(scope="module")
def compiler():
    """Start torch's compiler before the tests that use it, which takes seconds."""
    torch.compile(nn.Linear(2, 2), fullgraph=True, backend="aot_eager")(torch.ones(1, 2))


def test_registered_names():
    assert NAMES == ["hivit_b", "hivit_b24", "hivit_l", "hivit_nano", "hivit_s", "hivit_t"]
    nano = timm.create_model("hivit_nano")
    assert [stage["num_chs"] for stage in nano.feature_info] == [32, 64, 128]
    assert sum(p.numel() for p in nano.parameters()) < 1.5e6


def test_gmacs_of_real_and_meta_tensors_agree():
    """Compare CPU and meta device, whose kernels differ: torch does not count all of them."""
    plain = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    for model in (plain, timm.create_model("hivit_nano").eval()):
        x = torch.randn(1, *model.pretrained_cfg["input_size"])
        assert gmacs_of(model, x) == pytest.approx(count_gmacs(model, *x.shape), rel=1e-6)


@pytest.mark.parametrize("size", MILLIONS)
def test_parameters_and_gmacs_are_the_published_ones(size):
    with torch.device("meta"):
        model = timm.create_model(f"hivit_{size}")
    assert sum(p.numel() for p in model.parameters()) == round(MILLIONS[size] * 1e6)
    counted = count_gmacs(model, 1, 3, 224, 224)
    assert counted == pytest.approx(GMACS[size], rel=1e-3)
    if size in PUBLISHED:  # the published counts (fvcore) add 5 for each element that a LayerNorm writes
        elements = []
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_hook(lambda m, i, o: elements.append(o.numel()))
        model(torch.empty(1, 3, 224, 224, device="meta"))
        assert counted + 5 * sum(elements) / 1e9 == pytest.approx(PUBLISHED[size], abs=0.005)


def test_depths_and_drop_path_rates():
    model = timm.create_model("hivit_t", drop_path_rate=0.1)
    kinds = [type(block).__name__ for block in model.blocks]
    assert kinds == ["StemBlock"] * 2 + ["Merge"] + ["StemBlock"] * 2 + ["Merge"] + ["Block"] * 10
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx(torch.linspace(0, 0.1, 14).tolist())


def test_patch_embedding_equals_the_convolution():
    embed = fill(UnitPatchEmbed(4, 3, 8))
    images = torch.randn(2, 3, 32, 48)
    maps = embed.norm(rearrange(embed.proj(images), "b c h w -> b h w c"))
    expected = rearrange(maps, "b (gh ih) (gw iw) c -> b (gh gw) ih iw c", ih=4, iw=4)
    assert torch.allclose(embed(serialize(images, 16)), expected, atol=1e-5)


def test_merge_order_is_dx_dy():
    """Check that neighbors come in the order [0,0], [1,0], [0,1], [1,1] of (row, column). A (dy dx) order fails."""
    merge = Merge(1)
    merge.norm = nn.Identity()
    weight = torch.tensor([[1.0, 10.0, 100.0, 1000.0], [0.0, 1.0, 0.0, 0.0]])
    merge.reduction.weight = nn.Parameter(weight)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 1, 2, 2, 1)
    assert merge(x).flatten().tolist() == [1 + 30 + 200 + 4000, 3.0]


def test_tensors_have_the_released_names():
    """Compare with the released MAE checkpoint, which has 302 tensors including its mask token."""
    with torch.device("meta"):
        model = timm.create_model("hivit_b", num_classes=0, unit_form=True, multi_scale=True)
    state = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert len(state) + 1 == 302
    assert state["absolute_pos_embed"] == (1, 196, 512)
    assert state["norm.weight"] == (3584,)
    assert state["blocks.4.reduction.weight"] == (256, 512)
    assert state["blocks.9.norm.weight"] == (1024,)
    assert state["blocks.10.attn.qkv.bias"] == (1536,)
    tuned = timm.create_model("hivit_t")
    assert tuned.blocks[6].attn.relative_position_bias_table.shape == (729, 6)
    assert not any("relative_position_index" in k for k in tuned.state_dict())


@pytest.mark.parametrize("multi_scale", [False, True])
def test_dropping_pixels_equals_dropping_tokens_after_the_stem(multi_scale):
    model = fill(unit_form(multi_scale=multi_scale))
    images = torch.randn(2, 3, 32, 32)
    units, index = serialize(images, 4), sample_mask(2, 64, 0.75).visible
    early = model.encode_units(gather(units, index), index, (8, 8))
    # reference: all units pass through the stem, and masked ones are dropped before the main stage
    x, kept = model.patch_embed(units), []
    for block in model.blocks:
        if isinstance(block, Merge):
            kept.append(gather(x, index).flatten(2))
        if isinstance(block, Merge | StemBlock):
            x = block(x)
    x = gather(x.flatten(2) + model.absolute_pos_embed, index)
    for block in model.blocks[model.merges[1] + 1 :]:
        x = block(x)
    late = model.norm(torch.cat([*kept, x], -1) if multi_scale else x)
    assert torch.equal(early, late)
    assert early.shape == (2, 16, model.out_dim)
    order = torch.randperm(16)
    permuted = model.encode_units(gather(units, index[:, order]), index[:, order], (8, 8))
    assert torch.allclose(permuted, early[:, order], atol=1e-5)
    elsewhere = model.encode_units(gather(units, index), (index + 1) % 64, (8, 8))
    assert not torch.allclose(elsewhere, early, atol=1e-2)  # positions matter


def test_encoding_all_units_equals_the_forward_pass():
    model = fill(unit_form())
    images = torch.randn(2, 3, 32, 32)
    index = torch.arange(64).expand(2, 64)
    tokens = model.encode_units(serialize(images, 4), index, (8, 8))
    assert torch.allclose(tokens, model.norm(model.forward_features(images)), atol=1e-5)


def test_supervised_form_refuses_to_skip_units():
    model = timm.create_model("hivit_nano", **SMALL)
    with pytest.raises(UserError, match="unit_form=True"):
        model.encode_units(torch.zeros(1, 1, 3, 4, 4), torch.zeros(1, 1, dtype=torch.long), (8, 8))
    with pytest.raises(UserError, match="unit_form=True"):
        timm.create_model("hivit_nano", multi_scale=True)


def test_relative_bias_follows_swins_definition():
    """Look up the offset of position i from position j in the table by hand, on a grid that is not square."""
    model = fill(timm.create_model("hivit_nano", img_size=(32, 48)))
    table, bias = model.blocks[-1].attn.relative_position_bias_table, model.relative_bias(model.blocks[-1], (2, 3))
    for i in range(6):
        for j in range(6):
            dy, dx = i // 3 - j // 3, i % 3 - j % 3
            assert torch.equal(bias[:, i, j], table[(dy + 1) * 5 + (dx + 2)])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.booleans())
@torch.no_grad()
def test_windows_equal_masked_attention(height, width, window, unit_form):
    """Compare with an explicit bias (h n n): the resampled table inside a window, and -inf between windows."""
    options = {"img_size": 48, "depths": (1, 1, 8), "window": window, "unit_form": unit_form}
    model = fill(timm.create_model("hivit_nano", **options)).double()
    grid, n, main = (height, width), height * width, model.merges[1] + 1
    h, w = sides = window_sides(grid, window)
    places = [(i // width, i % width) for i in range(n)]
    ours = theirs = torch.randn(2, n, 128, dtype=torch.float64)
    for i in range(main, main + 8):
        block, bias = model.blocks[i], torch.full((4, n, n), -torch.inf, dtype=torch.float64)
        if i - main in (1, 3, 5, 7):
            bias = model.relative_bias(block, grid)
        else:
            for a, (y, x) in enumerate(places):
                for b, (v, u) in enumerate(places):
                    if (y // h, x // w) == (v // h, u // w):
                        bias[:, a, b] = 0
                        if not unit_form:
                            table = resample_bias_table(block.attn.relative_position_bias_table, (3, 3), sides)
                            bias[:, a, b] = table[(y - v + h - 1) * (2 * w - 1) + x - u + w - 1]
        ours, theirs = model.run_main_block(i, ours, grid), block(theirs, bias)
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_a_window_as_large_as_the_built_grid_uses_the_table_unchanged():
    model = fill(timm.create_model("hivit_nano", img_size=48, depths=(1, 1, 8), window=3)).double()
    tokens, first = torch.randn(1, 6, 9, 128, dtype=torch.float64), model.merges[1] + 1
    ours = model.run_main_block(first, tokens.flatten(1, 2), (6, 9)).view(1, 6, 9, 128)[:, 3:, :3].flatten(1, 2)
    one = tokens[:, 3:, :3].flatten(1, 2)
    torch.testing.assert_close(ours, model.run_main_block(first, one, (3, 3)))


def test_windows_are_stored_checked_and_switched_off(tmp_path):
    with torch.device("meta"):
        model = timm.create_model("hivit_b", window=14)
    assert [i - model.merges[1] - 1 for i in model.global_blocks] == [4, 9, 14, 19]
    model = timm.create_model("hivit_nano", **SMALL, num_classes=0, unit_form=True, window=3, depths=(1, 1, 8)).eval()
    write_model(model, tmp_path / "m")
    again = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    assert again.window == 3
    assert torch.equal(again(x), model(x))
    with pytest.raises(UserError, match="no whole windows of 3 to attend in: pass window=0"):
        model.encode_units(torch.zeros(1, 1, 3, 4, 4), torch.zeros(1, 1, dtype=torch.long), (8, 8))
    model.set_window(0)
    assert not torch.equal(again(x), model(x))
    with pytest.raises(UserError, match="window -1 is negative"):
        model.set_window(-1)


@pytest.mark.parametrize("name", NAMES)
def test_every_registered_size_runs_in_both_forms(name):
    with torch.device("meta"):
        model = timm.create_model(name, img_size=(96, 64), patch_size=2, in_chans=5, num_classes=7)
        assert model(torch.empty(2, 5, 96, 64)).shape == (2, 7)
        model = timm.create_model(name, num_classes=0, unit_form=True, multi_scale=True, img_size=(32, 64))
        latent = model.encode_units(torch.empty(2, 3, 3, 16, 16), torch.zeros(2, 3, dtype=torch.long), (2, 4))
        assert latent.shape == (2, 3, 7 * model.embed_dim)
        latent.sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == ["absolute_pos_embed"]  # fixed
        maps = timm.create_model(name, features_only=True)
        assert maps.feature_info.reduction() == [4, 8, 16]
        shapes = [tuple(m.shape[-2:]) for m in maps(torch.empty(1, 3, 64, 96))]
        assert shapes == [(16, 24), (8, 12), (4, 6)]


def test_other_input_sizes():
    model = fill(timm.create_model("hivit_nano", img_size=64)).eval()
    assert model(torch.randn(1, 3, 96, 128)).shape == (1, 1000)
    with pytest.raises(UserError, match=r"width of 100 px .* unit of 16 px"):
        model(torch.randn(1, 3, 64, 100))
    with pytest.raises(UserError, match=r"height of 50 px .* unit of 16 px"):
        timm.create_model("hivit_nano", img_size=50)


def test_intermediates_agree_with_the_forward_pass():
    model = fill(timm.create_model("hivit_nano", img_size=64)).eval()
    x = torch.randn(2, 3, 64, 64)
    tokens, maps = model.forward_intermediates(x)
    assert torch.equal(tokens, model.forward_features(x))
    assert torch.equal(maps[2].flatten(2).transpose(1, 2), tokens)
    embedded = model.blocks[0](model.patch_embed(serialize(x, 16)))  # nano has one stem block
    assert torch.equal(maps[0][:, :, 5, 9], embedded[:, 6, 1, 1])  # row 5, column 9 lies in unit (1, 2) at (1, 1)
    assert torch.equal(model.forward_head(tokens), model(x))
    first = timm.create_model("hivit_nano", features_only=True, out_indices=(0,), img_size=64)
    assert [tuple(m.shape) for m in first(x)] == [(2, 32, 16, 16)]
    assert sum(p.numel() for p in first.parameters()) < 40_000  # layers that the map does not need are removed


@pytest.mark.parametrize(
    "options", [{}, {"unit_form": True, "num_classes": 0}, {"drop_path_rate": 0.1, "global_pool": ""}], ids=str
)
def test_every_parameter_gets_a_gradient(options):
    model = timm.create_model("hivit_nano", **SMALL, **options)
    if options.get("unit_form"):
        index = torch.arange(64).expand(2, 64)
        model.encode_units(torch.randn(2, 64, 3, 4, 4), index, (8, 8)).square().sum().backward()
    else:
        fill(model)(torch.randn(2, 3, 32, 32)).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without
    fixed = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert fixed == (["absolute_pos_embed"] if options.get("unit_form") else [])


def test_gradient_checkpointing_keeps_gradients():
    model = fill(timm.create_model("hivit_nano", **SMALL))
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(x).sum().backward()
        gradients.append(model.patch_embed.proj.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("options", [{}, {"unit_form": True, "multi_scale": True, "num_classes": 0}], ids=str)
def test_compiles_and_exports_without_graph_breaks(options, compiler):
    model = fill(timm.create_model("hivit_nano", **SMALL, **options, depths=(1, 1, 1))).eval()
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-4)
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), model(x), atol=1e-4)


def test_layer_decay_groups():
    """Check that each block is a layer, and a merge belongs to the block before: 28 + stem + head for HiViT-B."""
    with torch.device("meta"):
        model = timm.create_model("hivit_b")
    groups = group_parameters(model, model.group_matcher())
    assert len(groups) == 30
    assert sorted(n for ns in groups.values() for n in ns) == sorted(n for n, _ in model.named_parameters())
    layer = {name: i for i, names in groups.items() for name in names}
    assert layer["absolute_pos_embed"] == layer["patch_embed.proj.weight"] == 0
    assert layer["blocks.4.reduction.weight"] == layer["blocks.3.mlp.fc1.weight"] == 4
    assert layer["blocks.5.mlp.fc1.weight"] == 5
    assert layer["blocks.29.mlp.fc1.weight"] == 28
    assert layer["head.weight"] == layer["fc_norm.weight"] == 29
    assert len(model.no_weight_decay()) == 21  # positions, and a table in each of 20 blocks


def test_round_trip_through_timm_keeps_outputs(tmp_path):
    model = fill(timm.create_model("hivit_nano", **SMALL, in_chans=5, num_classes=3)).eval()
    write_model(model, tmp_path / "m", input_size=(5, 32, 32), mean=[0.5] * 5, std=[0.5] * 5)
    x = torch.randn(2, 5, 32, 32)
    again = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    assert again.pretrained_cfg["mean"] == [0.5] * 5
    at_random = timm.create_model(f"local-dir:{tmp_path / 'm'}").eval()  # timm does not warn about missing weights
    assert not torch.allclose(at_random(x), model(x))
    wider = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True, img_size=(48, 64), in_chans=3)
    assert wider(torch.randn(1, 3, 48, 64)).shape == (1, 3)
    assert wider.absolute_pos_embed.shape == (1, 12 * 16, 128)
    assert wider.blocks[-1].attn.relative_position_bias_table.shape == (23 * 31, 4)


def test_tables_resampled_by_the_loader_equal_those_resampled_at_run_time():
    """Load a small model's tables into a larger model, and compare with the small model on larger images."""
    small = fill(timm.create_model("hivit_nano", img_size=64)).eval()
    large = timm.create_model("hivit_nano", img_size=(96, 128)).eval()
    large.pretrained_cfg = large.pretrained_cfg | {"input_size": (3, 64, 64)}
    large.load_state_dict(checkpoint_filter_fn(dict(small.state_dict()), large))
    x = torch.randn(1, 3, 96, 128)
    assert torch.allclose(large(x), small(x), atol=1e-5)


def as_the_authors(table, old, new):
    """Resample a table (n d) of a square grid as the authors' loader does: bicubic, by a scale."""
    maps = rearrange(table, "(y x) d -> 1 d y x", y=old)
    return rearrange(F.interpolate(maps, scale_factor=(new / old,) * 2, mode="bicubic"), "1 d y x -> (y x) d")


@pytest.mark.parametrize("antialias", [True, False])
@torch.no_grad()
def test_positions_at_another_size(antialias, tmp_path):
    """Released weights run at another size as the authors' code does, in all ways to get there."""
    small = fill(timm.create_model("hivit_nano", img_size=64, pos_antialias=antialias)).eval()
    state = dict(small.state_dict())
    state["absolute_pos_embed"] = as_the_authors(state["absolute_pos_embed"][0], 4, 7)[None]
    for name in [name for name in state if name.endswith("bias_table")]:
        state[name] = as_the_authors(state[name], 7, 13)
    theirs = timm.create_model("hivit_nano", img_size=112).eval()
    theirs.load_state_dict(state)
    write_model(small, tmp_path / "m", input_size=(3, 64, 64))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_args"]["pos_antialias"] is antialias
    folder, x = f"local-dir:{tmp_path / 'm'}", torch.randn(1, 3, 112, 112)
    at_run_time = timm.create_model(folder, pretrained=True).eval()
    by_the_loader = timm.create_model(folder, pretrained=True, img_size=112).eval()
    fine_tuned, _ = load_network(str(tmp_path / "m"), img_size=112, global_pool="")
    for net in (at_run_time, by_the_loader, fine_tuned.eval()):
        tokens, expected = net.forward_features(x), theirs.forward_features(x)
        assert torch.allclose(tokens, expected, atol=1e-5) is not antialias
    del config["model_args"]["pos_antialias"]  # as written before there was a choice
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert timm.create_model(folder, pretrained=True).pos_antialias


def test_another_patch_size_keeps_the_output_on_a_constant_image():
    """Resample the kernel (pseudo-inverse), and check that a constant image embeds to the same tokens."""
    model = fill(timm.create_model("hivit_nano", img_size=64)).eval()
    finer = timm.create_model("hivit_nano", img_size=128, patch_size=8)
    finer.load_state_dict(checkpoint_filter_fn(dict(model.state_dict()), finer))
    constant = torch.randn(1, 3, 1, 1)
    outputs = [m.eval()(constant.expand(1, 3, s, s)) for m, s in ((model, 64), (finer, 128))]
    assert torch.allclose(*outputs, atol=1e-3)


def test_widths_that_do_not_divide_are_refused():
    for options in ({"embed_dim": 100, "num_heads": 3}, {"embed_dim": 18, "num_heads": 2}):
        with pytest.raises(UserError, match=f"embed_dim {options['embed_dim']} does not divide"):
            timm.create_model("hivit_nano", **options)


def test_reset_classifier():
    model = timm.create_model("hivit_nano", **SMALL)
    model.reset_classifier(10)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    model.reset_classifier(10, global_pool="")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 64, 10)
    model.reset_classifier(0, global_pool="avg")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 128)
    with pytest.raises(UserError, match="'max'"):
        model.reset_classifier(10, global_pool="max")
