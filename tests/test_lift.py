"""The LiFT module: semantics of the published network, input checks, saving and loading."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lift_fast
from lift_fast import LiFT, load_lift, save_lift
from lift_fast.testing import randomize, relative_error

PUBLISHED_KEYS = [
    "up1.up.weight",
    "up1.up.bias",
    "up1.conv_1.double_conv.0.weight",
    *[
        f"up1.conv_1.double_conv.1.{n}"
        for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ],
    "up1.conv_1.double_conv.3.weight",
    *[
        f"up1.conv_1.double_conv.4.{n}"
        for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ],
    "outc.weight",
    "outc.bias",
    "image_convs_1.0.weight",
    "image_convs_1.0.bias",
    *[f"image_convs_1.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")],
    "image_convs_1.3.weight",
    "image_convs_1.3.bias",
    *[f"image_convs_1.4.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")],
    "image_convs_2.0.weight",
    "image_convs_2.0.bias",
    *[f"image_convs_2.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")],
]


def functional_lift(state, imgs, x, patch):
    """LiFT written from the paper's table with functional calls; ``imgs`` are whole patches, ``x`` is [B, C, h, w]."""

    def norm_relu(y, prefix):
        statistics = state[f"{prefix}.running_mean"], state[f"{prefix}.running_var"]
        return F.relu(F.batch_norm(y, *statistics, state[f"{prefix}.weight"], state[f"{prefix}.bias"], eps=1e-5))

    def conv(y, prefix, **options):
        return F.conv2d(y, state[f"{prefix}.weight"], state.get(f"{prefix}.bias"), **options)

    f = norm_relu(conv(imgs, "image_convs_1.0", stride=2, padding=1), "image_convs_1.1")
    f = norm_relu(conv(f, "image_convs_1.3", stride=2, padding=1), "image_convs_1.4")
    if patch != 8:
        f = F.max_pool2d(f, 2)
    g = norm_relu(conv(f, "image_convs_2.0", stride=2, padding=1), "image_convs_2.1")
    up = F.conv_transpose2d(torch.cat([x, g], 1), state["up1.up.weight"], state["up1.up.bias"], stride=2)
    y = torch.cat([up, f], 1)
    y = norm_relu(conv(y, "up1.conv_1.double_conv.0", padding=1), "up1.conv_1.double_conv.1")
    y = norm_relu(conv(y, "up1.conv_1.double_conv.3", padding=1), "up1.conv_1.double_conv.4")
    return conv(y, "outc")


def inputs(patch, height, width, channels, batch=1, dtype=torch.float32):
    grid = (height // patch) * (width // patch)
    return torch.randn(batch, 3, height, width, dtype=dtype), torch.randn(batch, grid, channels, dtype=dtype)


@pytest.mark.parametrize(("channels", "count"), [(384, 1_187_280), (768, 4_417_296)])
def test_parameters_and_state_dict_are_the_published_ones(channels, count):
    lift = LiFT(channels, 16)
    assert sum(p.numel() for p in lift.parameters()) == count
    assert list(lift.state_dict()) == PUBLISHED_KEYS
    assert len(lift.state_dict()) == 37
    half = channels // 2
    shapes = {name: list(value.shape) for name, value in lift.state_dict().items()}
    assert shapes["up1.up.weight"] == [channels + 32, (channels + 32) // 2, 2, 2]
    assert shapes["up1.conv_1.double_conv.0.weight"] == [half, (channels + 32) // 2 + 32, 3, 3]
    assert shapes["outc.weight"] == [channels, half, 1, 1]


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_plain_graph_is_the_published_function(patch, mode):
    lift = randomize(LiFT(10, patch), seed=patch).double().train(mode == "train")
    lift.fused = False
    imgs, x = inputs(patch, 3 * patch, 5 * patch, 10, batch=2, dtype=torch.float64)
    state = dict(lift.state_dict())
    if mode == "train":
        # In training BatchNorm uses the batch's statistics: the updated running statistics show that it did.
        before = state["image_convs_1.1.running_mean"].clone()
        lift(imgs, x)
        assert not torch.equal(before, lift.state_dict()["image_convs_1.1.running_mean"])
    else:
        expected = functional_lift(state, imgs, x.transpose(1, 2).unflatten(2, (3, 5)), patch)
        assert relative_error(lift(imgs, x), expected.flatten(2).transpose(1, 2)) < 1e-13


@pytest.mark.parametrize("fused", [True, False])
def test_token_and_map_layouts_agree(fused):
    lift = randomize(LiFT(12, 16), seed=1).eval()
    imgs, x = inputs(16, 48, 80, 12, batch=2)
    maps = LiFT(12, 16, pre_shape=False, post_shape=False).eval()
    maps.load_state_dict(lift.state_dict())
    lift.fused = maps.fused = fused
    with torch.no_grad():
        tokens = lift(imgs, x)
        image = maps(imgs, x.transpose(1, 2).unflatten(2, (3, 5)))
    assert tokens.shape == (2, 4 * 15, 12)
    assert image.shape == (2, 12, 6, 10)
    torch.testing.assert_close(tokens, image.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("fused", [True, False])
def test_the_image_branch_sees_the_pixels_that_the_tokens_saw(fused):
    lift = randomize(LiFT(8, 16), seed=2).eval()
    lift.fused = fused
    imgs, x = inputs(16, 56, 41, 8)
    with torch.no_grad():
        torch.testing.assert_close(lift(imgs, x), lift(imgs[:, :, :48, :32], x))
        beyond = imgs.clone()
        beyond[:, :, 48:], beyond[:, :, :, 32:] = torch.nan, torch.nan
        assert torch.equal(lift(beyond, x), lift(imgs, x))


@pytest.mark.parametrize("fused", [True, False])
def test_fifty_sizes_equal_the_network_written_line_by_line(fused):
    generator = torch.Generator().manual_seed(50)
    networks = {patch: randomize(LiFT(12, patch), seed=patch).eval() for patch in (8, 14, 16)}
    uncropped = 0
    for number in range(50):
        patch = (16, 8, 14, 16)[number % 4]
        height, width = torch.randint(patch, 8 * patch, (2,), generator=generator).tolist()
        h, w = height // patch, width // patch
        imgs, x = inputs(patch, height, width, 12)
        seen = imgs.double()
        if patch == 16 and height % 16 <= 4 and width % 16 <= 4:
            # The published module itself runs at these, on the whole image.
            uncropped += 1
        else:
            seen = seen[:, :, : patch * h, : patch * w]
        if patch == 14:
            seen = F.interpolate(seen, size=(16 * h, 16 * w), mode="bilinear", antialias=True)
        lift = networks[patch]
        lift.fused = fused
        state = {name: value.double() for name, value in lift.state_dict().items()}
        expected = functional_lift(state, seen, x.double().transpose(1, 2).unflatten(2, (h, w)), patch)
        with torch.no_grad():
            error = relative_error(lift(imgs, x), expected.flatten(2).transpose(1, 2))
        assert error <= 1e-5, (patch, height, width)
    assert uncropped >= 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("patch", [14, 5, 32])
def test_other_patch_sizes_are_resized_to_sixteen(patch, fused):
    lift = randomize(LiFT(8, patch), seed=3).eval()
    imgs, x = inputs(patch, 3 * patch, 2 * patch, 8)
    sixteen = LiFT(8, 16).eval()
    sixteen.load_state_dict(lift.state_dict())
    lift.fused = sixteen.fused = fused
    resized = F.interpolate(imgs, size=(48, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(lift(imgs, x), sixteen(resized, x))


def test_training_gradients():
    torch.manual_seed(0)
    lift = LiFT(4, 8, image_channels=3).double().train()
    imgs, x = inputs(8, 16, 24, 4, batch=2, dtype=torch.float64)
    x.requires_grad_()
    imgs.requires_grad_()
    # ReLU has no derivative at 0; random float64 inputs differ from it by more than the step.
    assert torch.autograd.gradcheck(lift, (imgs, x), eps=1e-7, atol=1e-5)
    lift(imgs, x).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in lift.parameters())


def test_evaluation_with_gradients_runs_the_plain_graph():
    lift = randomize(LiFT(8, 8), seed=4).eval()
    imgs, x = inputs(8, 24, 24, 8)
    out = lift(imgs, x.requires_grad_())
    out.sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(out.detach(), lift(imgs, x), rtol=1e-4, atol=1e-5)


def test_no_image_variant_is_smaller_and_ignores_the_image():
    lift = randomize(LiFT(8, 16, use_image=False), seed=5).eval()
    assert not any(name.startswith("image") for name in lift.state_dict())
    assert lift.state_dict()["up1.up.weight"].shape == (8, 4, 2, 2)
    assert lift.state_dict()["up1.conv_1.double_conv.0.weight"].shape == (4, 4, 3, 3)
    imgs, x = inputs(16, 32, 48, 8)
    with torch.no_grad():
        fused = lift(imgs, x)
        torch.testing.assert_close(fused, lift(torch.zeros_like(imgs), x))
        lift.fused = False
        torch.testing.assert_close(fused, lift(imgs, x), rtol=1e-4, atol=1e-5)


def test_same_seed_gives_the_published_initial_weights():
    # Layers are made in the published order, so a seed reproduces the published initialisation.
    torch.manual_seed(11)
    first = nn.ConvTranspose2d(40, 20, 2, 2).weight
    torch.manual_seed(11)
    assert torch.equal(LiFT(8, 8).up1.up.weight, first)


BAD_CALLS = {
    "batch 0": (lambda: (torch.zeros(0, 3, 32, 32), torch.zeros(0, 4, 8)), "empty batch"),
    "token count": (lambda: (torch.zeros(1, 3, 32, 32), torch.zeros(1, 5, 8)), r"\[1, 4, 8\].*got \[1, 5, 8\]"),
    "class token": (lambda: (torch.zeros(1, 3, 32, 32), torch.zeros(1, 5, 8)), "without class token"),
    "channels": (lambda: (torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 9)), "in_channels=8"),
    "batch mismatch": (lambda: (torch.zeros(2, 3, 32, 32), torch.zeros(1, 4, 8)), r"got \[1, 4, 8\]"),
    "grey image": (lambda: (torch.zeros(1, 1, 32, 32), torch.zeros(1, 4, 8)), r"\[B, 3, H, W\], got \[1, 1, 32, 32\]"),
    "integer image": (lambda: (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(1, 4, 8)), "uint8"),
    "small image": (lambda: (torch.zeros(1, 3, 15, 32), torch.zeros(1, 0, 8)), "15 x 32 pixels are smaller than one"),
    "map for tokens": (lambda: (torch.zeros(1, 3, 32, 32), torch.zeros(1, 8, 2, 2)), r"\[B, T, C\]"),
    "mixed dtypes": (lambda: (torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 8).bfloat16()), "one dtype"),
    "device": (lambda: (torch.zeros(1, 3, 32, 32), torch.zeros(1, 4, 8, device="meta")), "meta"),
    "no tensor": (lambda: ([[0.0]], torch.zeros(1, 4, 8)), "list"),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(case, mode):
    make, message = BAD_CALLS[case]
    lift = LiFT(8, 16).train(mode == "train")
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        lift(*make())


@pytest.mark.parametrize("arguments", [(1, 16), (8, 0), (8.0, 16), (True, 16), (8, "16")])
def test_bad_construction_is_named(arguments):
    with pytest.raises(ValueError, match="must be an integer >="):
        LiFT(*arguments)


@pytest.mark.parametrize("name", ["outc.bias", "up1.up.weight", "image_convs_2.1.running_var"])
def test_weights_that_are_not_finite_are_refused(name, tmp_path):
    lift = LiFT(8, 16).eval()
    with torch.no_grad():
        lift.state_dict()[name].view(-1)[0] = float("nan")
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            lift(*inputs(16, 32, 32, 8))
    torch.save(lift.state_dict(), tmp_path / "nan.pth")
    with pytest.raises(ValueError, match=r"nan\.pth.*NaN"):
        load_lift(tmp_path / "nan.pth", patch_size=16)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("options", [{}, {"use_image": False}, {"extra_image_blocks": 1, "image_channels": 24}])
def test_checkpoint_round_trip(tmp_path, suffix, options):
    lift = randomize(LiFT(10, 16, **options), seed=6)
    path = tmp_path / f"lift{suffix}"
    save_lift(lift, path)
    again = load_lift(path, patch_size=16)
    assert not again.training
    assert list(again.state_dict()) == list(lift.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), lift.state_dict().values(), strict=True))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_file_loads_unchanged(tmp_path, prefix):
    lift = randomize(LiFT(384, 16), seed=7).eval()
    torch.save({prefix + name: value for name, value in lift.state_dict().items()}, tmp_path / "published.pth")
    again = load_lift(tmp_path / "published.pth", patch_size=16)
    imgs, x = inputs(16, 32, 48, 384)
    with torch.no_grad():
        assert torch.equal(lift(imgs, x), again(imgs, x))


def test_our_file_is_a_plain_state_dict(tmp_path):
    lift = LiFT(8, 8)
    save_lift(lift, tmp_path / "ours.pth")
    content = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert type(content) is dict
    assert list(content) == PUBLISHED_KEYS


def test_corrupt_and_wrong_files_are_named(tmp_path):
    corrupt = tmp_path / "corrupt.pth"
    save_lift(LiFT(8, 8), corrupt)
    corrupt.write_bytes(corrupt.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"corrupt\.pth is not a readable checkpoint"):
        load_lift(corrupt, patch_size=8)
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        load_lift(tmp_path / "missing.pth", patch_size=8)
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is not a LiFT checkpoint.*fc\.weight"):
        load_lift(tmp_path / "other.pth", patch_size=8)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth contains a list"):
        load_lift(tmp_path / "list.pth", patch_size=8)
    state = LiFT(8, 8).state_dict()
    del state["outc.bias"]
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(ValueError, match=r"partial\.pth does not fit.*outc\.bias"):
        load_lift(tmp_path / "partial.pth", patch_size=8)


def test_malicious_pickle_is_not_executed(tmp_path):
    class Malice:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"outc.weight": Malice()}))
    with pytest.raises(ValueError, match=r"evil\.pth"):
        load_lift(tmp_path / "evil.pth", patch_size=8)
    assert not (tmp_path / "pwned").exists()


def test_hub_mixin_round_trip(tmp_path):
    lift = randomize(LiFT(10, 14, post_shape=False, image_channels=16), seed=8)
    lift.save_pretrained(tmp_path / "hub")
    assert {p.name for p in (tmp_path / "hub").iterdir()} >= {"config.json", "model.safetensors"}
    again = LiFT.from_pretrained(tmp_path / "hub")
    assert (again.in_channels, again.patch_size, again.post_shape) == (10, 14, False)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), lift.state_dict().values(), strict=True))


def test_copies_compute_the_same():
    lift = randomize(LiFT(8, 16), seed=9).eval()
    imgs, x = inputs(16, 32, 48, 8)
    with torch.no_grad():
        expected = lift(imgs, x)
        for twin in (copy.deepcopy(lift), pickle.loads(pickle.dumps(lift))):
            assert torch.equal(twin(imgs, x), expected)
            twin.outc.bias.add_(1)
            torch.testing.assert_close(twin(imgs, x), expected + 1)
        assert torch.equal(lift(imgs, x), expected)


def test_public_names():
    expected = {
        "LiFT",
        "ViTLiFTExtractor",
        "nearest",
        "propagate_labels",
        "dense_match",
        "match_images",
        "backends",
        "load_lift",
        "save_lift",
        "clear_plans",
    }
    assert expected <= set(lift_fast.__all__)
    assert all(getattr(lift_fast, name) is not None for name in lift_fast.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        lift_fast.no_such_name  # noqa: B018  the access is the test
