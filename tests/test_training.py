"""Training: the objective against the published one, resuming, order and jitter of images, what is refused."""

from __future__ import annotations

import csv
import json
import multiprocessing
import resource
import subprocess
import sys
import types
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
import training_runs
from PIL import Image
from torch import nn
from training_runs import write_images

from lift_fast import LiFT, ViTLiFTExtractor, load_backbone
from lift_fast.images import to_tensor
from lift_fast.losses import feature_loss
from lift_fast.testing import relative_error
from lift_fast.training import NotSaved, TrainingSettings, split, train
from lift_fast.training.data import GlobalBatches, TrainingImages, build_loader, color_jitter, fit_square
from lift_fast.training.objective import FrozenFeatures, Objective
from lift_fast.training.reference import PlainObjective
from lift_fast.training.settings import contradictions
from lift_fast.training.step import resolve_precision

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """21 images."""
    return write_images(tmp_path_factory.mktemp("images"), 21, nested=True)


settings = partial(training_runs.settings, epochs=2)


def log(out):
    with (out / "log.csv").open(newline="") as file:
        return [(int(row["step"]), int(row["epoch"]), float(row["loss"])) for row in csv.DictReader(file)]


def state(out, name="lift.pth"):
    return torch.load(out / name, weights_only=True)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """Two epochs of five steps, uninterrupted."""
    out = tmp_path_factory.mktemp("straight")
    return out, train(settings(folder, out), quiet=True)


def test_figures_files_and_a_loss_that_falls(folder, straight):
    out, figures = straight
    assert (figures["steps"], figures["epochs"], figures["images"], figures["pictures"]) == (10, 2, 40, 21)
    assert figures["unreadable"] == []
    assert figures["parameters"] == sum(p.numel() for p in LiFT(192, 16).parameters())
    rows = log(out)
    assert [row[:2] for row in rows] == [(step, 1 + (step > 5)) for step in range(1, 11)]
    assert figures["epoch_losses"] == pytest.approx(
        [np.mean([r[2] for r in rows[:5]]), np.mean([r[2] for r in rows[5:]])]
    )
    # Cosine distances of fresh random features begin near 1 each.
    assert rows[0][2] > 1.7
    assert figures["epoch_losses"][1] < figures["epoch_losses"][0] - 0.1
    json.dumps(figures)


def test_the_checkpoint_is_the_published_format_and_loads_in_the_extractor(straight):
    out, _ = straight
    assert list(state(out)) == list(LiFT(192, 16).state_dict())
    assert all(value.is_contiguous() for value in state(out).values())
    extractor = ViTLiFTExtractor(
        "vit_tiny_patch16_224", out / "lift.pth", layer=1, channel=None, patch=None, stride=None, device="cpu",
        random_weights=True, silent=True,
    )  # fmt: skip
    assert extractor.extract_descriptors(torch.randn(1, 3, 64, 32)).shape == (1, 32, 192)


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_resumed_training_is_bit_exact(folder, tmp_path, straight, stop):
    expected, _ = straight
    train(settings(folder, tmp_path, max_steps=stop), quiet=True)
    assert state(tmp_path, "last.pth")["progress"]["step"] == stop
    # What a killed process has written after its last save.
    with (tmp_path / "log.csv").open("a") as file:
        file.write("99,9,0.1,0.1,0.1,1,0\n7,")
    figures = train(settings(folder, tmp_path, workers=1), resume=True, quiet=True)
    assert figures["resumed"] == stop
    assert_same(state(tmp_path), state(expected))
    assert log(tmp_path) == log(expected)
    saved, wanted = state(tmp_path, "last.pth"), state(expected, "last.pth")
    assert saved["progress"]["losses"] == wanted["progress"]["losses"]
    for number, entry in wanted["optimizer"]["state"].items():
        assert_same(saved["optimizer"]["state"][number], entry)


def test_resume_begins_anew_where_nothing_is_and_goes_on_for_more_epochs(folder, tmp_path):
    figures = train(settings(folder, tmp_path, epochs=1), resume=True, quiet=True)
    assert (figures["resumed"], figures["steps"]) == (0, 5)
    figures = train(settings(folder, tmp_path, epochs=2), resume=True, quiet=True)
    assert (figures["resumed"], figures["steps"]) == (5, 10)
    with pytest.raises(ValueError, match="is at step 10, beyond the requested 5"):
        train(settings(folder, tmp_path, epochs=1), resume=True, quiet=True)
    # Nothing left to do is no error.
    assert train(settings(folder, tmp_path, epochs=2), resume=True, quiet=True)["images_per_second"] is None


def test_a_contradicting_resume_is_refused(folder, tmp_path, straight):
    out, _ = straight
    for change, named in (
        ({"loss": "l1"}, "loss: saved 'cosine', now 'l1'"),
        ({"target": "half-stride"}, "target: saved 'double-size', now 'half-stride'"),
        ({"batch_size": 5}, "batch_size: saved 4, now 5"),
        ({"limit": 20}, "pictures: saved"),
        ({"learning_rate": 0.1, "seed": 1}, "learning_rate: saved 0.001, now 0.1; seed: saved 0, now 1"),
    ):
        with pytest.raises(ValueError, match="resume with the same ones") as error:
            train(settings(folder, out, **change), resume=True, quiet=True)
        assert named in str(error.value)
    assert not contradictions({"epochs": 1, "loss": "l1"}, {"epochs": 2, "loss": "l1"})


def test_a_folder_with_a_training_is_not_overwritten_unasked(folder, tmp_path):
    train(settings(folder, tmp_path, max_steps=1), quiet=True)
    before = (tmp_path / "last.pth").read_bytes()
    with pytest.raises(FileExistsError, match=r"already contains last.pth and lift.pth"):
        train(settings(folder, tmp_path, max_steps=1), quiet=True)
    assert (tmp_path / "last.pth").read_bytes() == before
    (tmp_path / "unreadable.txt").write_text("an older run's")
    train(settings(folder, tmp_path, max_steps=1, seed=3), overwrite=True, quiet=True)
    assert len(log(tmp_path)) == 1
    assert not (tmp_path / "unreadable.txt").exists()


def test_what_cannot_begin_overwrites_nothing(folder, tmp_path, monkeypatch):
    train(settings(folder, tmp_path, max_steps=1), quiet=True)
    before = (tmp_path / "last.pth").read_bytes()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        train(settings(folder, tmp_path, tensorboard=True), overwrite=True, quiet=True)
    assert (tmp_path / "last.pth").read_bytes() == before


@contextmanager
def files_of_at_most(size):
    """A file that grows beyond ``size`` bytes meets what a full disk gives: an error of the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("size", "what"), [(0, "log.csv"), (200_000, "lift.pth"), (2_000_000, "last.pth")])
def test_a_full_disk_is_said_and_keeps_what_was_saved(folder, tmp_path, size, what):
    train(settings(folder, tmp_path, max_steps=1), quiet=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # What the sizes are for: room for the log alone, for LiFT as well, for nothing.
    assert len(before["log.csv"]) + 100 < 200_000 < len(before["lift.pth"]) < 2_000_000 < len(before["last.pth"])
    with (
        files_of_at_most(size),
        pytest.raises(NotSaved, match=r"cannot write to .* at step \d: File too large\. The files saved .* resume$"),
    ):
        train(settings(folder, tmp_path, max_steps=2), resume=True, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(before)
    assert (tmp_path / "last.pth").read_bytes() == before["last.pth"]
    assert ((tmp_path / "lift.pth").read_bytes() == before["lift.pth"]) == (what != "last.pth")
    train(settings(folder, tmp_path, max_steps=2), resume=True, quiet=True)
    train(settings(folder, tmp_path / "straight", max_steps=2), quiet=True)
    assert_same(state(tmp_path), state(tmp_path / "straight"))


def test_another_backbone_file_under_the_same_name_is_refused(folder, tmp_path):
    model = load_backbone("vit_tiny_patch16_224", random_weights=True).model
    torch.save(model.state_dict(), tmp_path / "a.pth")
    with torch.no_grad():
        model.patch_embed.proj.weight += 1e-3
    torch.save(model.state_dict(), tmp_path / "b.pth")
    common = {"random_weights": False, "max_steps": 1}
    train(settings(folder, tmp_path / "out", weights=tmp_path / "a.pth", **common), quiet=True)
    (tmp_path / "a.pth").rename(tmp_path / "moved.pth")
    train(settings(folder, tmp_path / "out", weights=tmp_path / "moved.pth", **common), resume=True, quiet=True)
    with pytest.raises(ValueError, match="backbone: saved "):
        train(settings(folder, tmp_path / "out", weights=tmp_path / "b.pth", **common), resume=True, quiet=True)


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_broken_state_is_refused(folder, tmp_path, content):
    if content is None:
        torch.save({"format": 99}, tmp_path / "last.pth")
    else:
        (tmp_path / "last.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"last.pth"):
        train(settings(folder, tmp_path), resume=True, quiet=True)


def test_unreadable_images_are_replaced_and_named(folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        whole = path.read_bytes()
        (data / f"{number}.jpg").write_bytes(whole if number != 2 else whole[: len(whole) // 2])
    (data / "no.png").write_bytes(b"no image")
    figures = train(settings(data, tmp_path / "out", workers=2, batch_size=11), quiet=True)
    # One batch of all eleven files in each epoch.
    assert figures["steps"] == 2
    assert len(figures["unreadable"]) == 2
    assert {"2.jpg", "no.png"} == {
        name for name in ("2.jpg", "no.png", "3.jpg") if name in " ".join(figures["unreadable"])
    }
    assert len((tmp_path / "out" / "unreadable.txt").read_text().splitlines()) == 2
    with (tmp_path / "out" / "log.csv").open(newline="") as file:
        assert list(csv.DictReader(file))[-1]["unreadable"] == "2"


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_unreadable_images_is_an_error(tmp_path, workers):
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^more than 50 images in a row cannot be read, the last: ") as error:
        train(settings(tmp_path, tmp_path / "out", workers=workers), quiet=True)
    assert "Traceback" not in str(error.value)
    # The error still holds the frames of the training; its processes must not outlive it.
    assert multiprocessing.active_children() == []


def test_tensorboard_gets_every_step_where_it_is_installed(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        train(settings(folder, tmp_path / "a", tensorboard=True), quiet=True)
    seen = []

    class Writer:
        def __init__(self, folder, purge_step):
            seen.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            seen.append((name, step))

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    train(settings(folder, tmp_path / "b", tensorboard=True, max_steps=2), quiet=True)
    # Steps of an earlier run in this folder are not shown.
    assert seen[0] == (str(tmp_path / "b"), 1)
    assert [entry for entry in seen if entry[0] == "loss"] == [("loss", 1), ("loss", 2)]
    assert seen[-1] == "closed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 72}, r"multiple of four patches \(64 pixels\).*got 72; use 64"),
        ({"batch_size": 64}, "21 images to train on are fewer than one batch of 64"),
        ({"batch_size": 20, "held_out": 0.1}, r"19 images to train on \(2 are held out\)"),
        ({"model": "dino_vits17"}, "unknown backbone"),
        ({"device": "warp"}, "device 'warp' does not exist"),
        ({"precision": "float16"}, "float16 needs a GPU"),
        ({"layer": 12}, "layer must be"),
    ],
)
def test_runs_that_cannot_be(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(settings(folder, tmp_path, **changes), quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "triple-size"},
        {"loss": "hinge"}, {"fit": "stretch"}, {"precision": "int8"}, {"facet": "keys"}, {"epochs": 0}, {"epochs": 1.5},
        {"batch_size": 0}, {"batch_size": True}, {"jitter": 0.6}, {"jitter": float("nan")}, {"held_out": 1.0},
        {"learning_rate": 0.0}, {"learning_rate": float("inf")}, {"seed": -1}, {"workers": -1}, {"limit": 0},
        {"data": 3}, {"save_every_epochs": 0}, {"image_channels": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        TrainingSettings(**{"data": "a", "out": "b", **changes})


def test_missing_folder_and_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        train(settings(tmp_path / "none", tmp_path / "out"), quiet=True)
    with pytest.raises(ValueError, match="no images"):
        train(settings(tmp_path, tmp_path / "out"), quiet=True)


def test_a_diverging_loss_stops_and_keeps_what_was_saved(folder, tmp_path):
    train(settings(folder, tmp_path, max_steps=1, learning_rate=1e30, loss="l2"), quiet=True)
    before = (tmp_path / "lift.pth").read_bytes()
    with pytest.raises(FloatingPointError, match="use a lower learning rate"):
        train(settings(folder, tmp_path, learning_rate=1e30, loss="l2"), resume=True, quiet=True)
    assert (tmp_path / "lift.pth").read_bytes() == before
    assert all(bool(torch.isfinite(value).all()) for value in state(tmp_path).values())


@pytest.mark.parametrize(
    "changes",
    [
        {"use_image": False}, {"image_channels": 8, "extra_image_blocks": 1}, {"loss": "l1"}, {"loss": "l2"},
        {"target": "half-stride"},
        {"facet": "token"}, {"fit": "crop", "jitter": 0.0}, {"model": "vit_small_patch14_dinov2", "image_size": 56},
    ],
)  # fmt: skip
def test_variants_train(folder, tmp_path, changes):
    run = settings(folder, tmp_path, **{"max_steps": 4, **changes})
    figures = train(run, quiet=True)
    losses = [row[2] for row in log(tmp_path)]
    assert min(losses) < losses[0]
    extractor = ViTLiFTExtractor(
        run.model, figures["lift"], layer=1, facet=run.facet, channel=None, patch=None, stride=None, device="cpu",
        random_weights=True, silent=True,
    )  # fmt: skip
    side = run.image_size
    assert extractor.extract_descriptors(torch.randn(1, 3, side, side)).shape[1] == 4 * (side // extractor.patch) ** 2


@pytest.mark.skipif(
    resolve_precision("auto", torch.device("cpu")) != torch.bfloat16, reason="this processor emulates bfloat16"
)
def test_bfloat16_follows_float32(folder, tmp_path, straight):
    train(settings(folder, tmp_path, precision="auto"), quiet=True)
    ours, exact = np.array([row[2] for row in log(tmp_path)]), np.array([row[2] for row in log(straight[0])])
    assert np.abs(ours - exact).max() < 0.05
    assert all(value.dtype in (torch.float32, torch.int64) for value in state(tmp_path).values())


@pytest.mark.parametrize("loss", ["cosine", "l1", "l2"])
@pytest.mark.parametrize("use_image", [True, False])
def test_objective_and_gradients_are_the_published_ones(loss, use_image):
    # timm's position rule, because the hooked network is timm's own; in float64, so that any other graph shows.
    backbone = load_backbone(
        "vit_tiny_patch16_224", random_weights=True, layer=2, head_order="interleaved", position_rule="timm"
    ).double()
    torch.manual_seed(1)
    lift = LiFT(192, 16, use_image=use_image).double().train()
    plain = LiFT(192, 16, pre_shape=False, post_shape=False, use_image=use_image).double().train()
    plain.load_state_dict(lift.state_dict())
    pixels = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    features = FrozenFeatures(backbone)
    views = features(pixels)
    # The loss of the package may compute in float32.
    tolerance = 1e-5
    losses = Objective(lift, loss)(views)
    imgs = ((pixels.double() / 255 - features.mean) / features.std).float().double()
    expected = PlainObjective(backbone.model, plain, loss, layer=2)(imgs)
    assert relative_error(losses, expected) < tolerance
    losses.sum().backward()
    expected.sum().backward()
    for (name, ours), theirs in zip(lift.named_parameters(), plain.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-4 or float(theirs.grad.abs().max()) < 1e-9, name
    assert_close_buffers(lift, plain)


def assert_close_buffers(a: nn.Module, b: nn.Module) -> None:
    for (name, ours), theirs in zip(a.named_buffers(), b.buffers(), strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-6, atol=1e-9), name


def test_trained_features_are_those_that_the_extractor_feeds(folder):
    path = sorted(folder.rglob("*.png"))[0]
    backbone = load_backbone("vit_tiny_patch16_224", random_weights=True, head_order="interleaved")
    seen: list[torch.Tensor] = []

    class Watch(nn.Module):
        in_channels, patch_size = 192, 16

        def forward(self, imgs, x):
            seen.append(x)
            return x

    image = fit_square(path, 64, "squash")
    extractor = ViTLiFTExtractor(
        "vit_tiny_patch16_224", lift=Watch(), channel=None, patch=None, stride=None, device="cpu", random_weights=True,
        silent=True,
    )  # fmt: skip
    extractor.extract_descriptors(to_tensor(image, backbone.mean, backbone.std))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    assert relative_error(FrozenFeatures(backbone)(pixels).half_target, seen[0]) < 1e-5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch8_224"])
def test_half_stride_targets_are_those_of_a_padded_image(name):
    backbone = load_backbone(name, random_weights=True, layer=1, head_order="interleaved").double()
    side = 4 * 2 * backbone.patch_size
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    features = FrozenFeatures(backbone, target="half-stride")
    views, published = features(pixels), FrozenFeatures(backbone)(pixels)
    for field in ("half", "quarter", "half_features", "quarter_features"):
        assert torch.equal(getattr(views, field), getattr(published, field))
    imgs = ((pixels.float() / 255 - features.mean) / features.std).double()
    stride = backbone.patch_size // 2
    for step, target in ((2, views.half_target), (4, views.quarter_target)):
        # Patches on twice the grid: the first begins a quarter of a patch before the image.
        pad = (stride // 2, stride - stride // 2)
        wide = np.pad(imgs[:, :, ::step, ::step].numpy(), ((0, 0), (0, 0), pad, pad), mode="reflect")
        expected = load_strided(name, stride, backbone)(torch.from_numpy(wide))
        assert target.shape == (2, (2 * side // step // backbone.patch_size) ** 2, backbone.embed_dim)
        assert relative_error(target, expected) < 1e-10


def load_strided(name, stride, like):
    other = load_backbone(name, random_weights=True, layer=1, head_order="interleaved", stride=stride).double()
    other.model.load_state_dict(like.model.state_dict())
    return other


def test_half_stride_needs_an_even_patch():
    backbone = load_backbone("vit_tiny_patch16_224", random_weights=True)
    backbone.patch_size = 15
    with pytest.raises(ValueError, match="even patch size, got 15"):
        FrozenFeatures(backbone, target="half-stride")


def test_images_do_not_depend_on_who_reads_them(folder):
    paths = sorted(folder.rglob("*.*"))
    images = TrainingImages(paths, 32, "squash", 0.2, seed=5)

    def read(workers, start):
        batches = GlobalBatches(len(paths), 4, seed=5)
        batches.epoch, batches.start = 1, start
        return [batch.pixels for batch in build_loader(images, batches, workers, pin=False)]

    alone, helped, late = read(0, 0), read(2, 0), read(2, 3)
    assert len(alone) == 5
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(alone[3:], late, strict=True))
    # Another epoch, another jitter; no jitter, the image itself.
    assert not torch.equal(images[(0, 3)].pixels, images[(1, 3)].pixels)
    still = TrainingImages(paths, 32, "squash", 0.0, seed=5)[(0, 3)].pixels
    assert np.array_equal(still.permute(1, 2, 0), np.array(fit_square(paths[3], 32, "squash")))


@pytest.mark.parametrize(("count", "batch", "world"), [(21, 4, 1), (21, 4, 2), (24, 6, 3), (7, 7, 7)])
def test_processes_share_one_permutation(count, batch, world):
    epochs = []
    for epoch in (0, 1):
        ranks = []
        for rank in range(world):
            batches = GlobalBatches(count, batch, 9, rank, world)
            batches.epoch = epoch
            ranks.append(list(batches))
            assert len(ranks[-1]) == len(batches) == count // batch
        whole = [[key for part in parts for key in part] for parts in zip(*ranks, strict=True)]
        one = GlobalBatches(count, batch, 9)
        one.epoch = epoch
        assert whole == list(one)
        indices = [index for members in whole for _, index in members]
        assert len(set(indices)) == len(indices) == count // batch * batch
        epochs.append(indices)
    assert epochs[0] != epochs[1]


def test_jitter_is_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms.functional")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    orders = set()
    for seed in range(30):
        random = np.random.default_rng(seed)
        brightness, contrast, saturation = random.uniform(0.7, 1.3, 3)
        hue = random.uniform(-0.3, 0.3)
        expected, order = image, tuple(random.permutation(4))
        orders.add(order)
        for step in order:
            expected = (
                transforms.adjust_brightness(expected, brightness),
                transforms.adjust_contrast(expected, contrast),
                transforms.adjust_saturation(expected, saturation),
                transforms.adjust_hue(expected, hue),
            )[step]
        actual = color_jitter(image, 0.3, np.random.default_rng(seed))
        assert np.array_equal(np.array(actual), np.array(expected)), seed
    assert len(orders) > 10


def test_large_jpegs_are_decoded_smaller(tmp_path):
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    image = small.resize((900, 600), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    from lift_fast.images import read_image

    assert read_image(tmp_path / "a.jpg", at_least=64).size == (113, 75)
    assert read_image(tmp_path / "a.jpg", at_least=601).size == read_image(tmp_path / "a.jpg").size == (900, 600)
    assert read_image(tmp_path / "a.png", at_least=64).size == (900, 600)
    for fit in ("squash", "crop"):
        fast, whole = (np.array(fit_square(tmp_path / f"a.{s}", 64, fit), dtype=float) for s in ("jpg", "png"))
        assert fast.shape == (64, 64, 3)
        assert np.abs(fast - whole).mean() < 2


def test_crop_keeps_the_centre(tmp_path):
    array = np.zeros((64, 128, 3), dtype=np.uint8)
    array[:, 32:96] = 200
    Image.fromarray(array).save(tmp_path / "a.png")
    assert (np.array(fit_square(tmp_path / "a.png", 64, "crop")) == 200).all()
    assert np.array(fit_square(tmp_path / "a.png", 64, "squash"))[0, 0, 0] == 0


def test_holdout_is_the_rule_of_split(folder, tmp_path):
    figures = train(settings(folder, tmp_path, held_out=0.1, max_steps=1), quiet=True)
    kept, held = split(folder.rglob("*.*"), 0.1, folder)
    assert (figures["pictures"], figures["held_out"]) == (len(kept), len(held)) == (19, 2)


def test_losses_by_name():
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.allclose(feature_loss("l1")(a, b, 2), nn.functional.l1_loss(a, b))
    assert torch.allclose(feature_loss("l2")(a, b, 2), nn.functional.mse_loss(a, b))
    expected = (1 - nn.functional.cosine_similarity(a, b, dim=2)).mean()
    assert torch.allclose(feature_loss("cosine")(a, b, 2), expected, atol=1e-6)


def test_the_package_is_imported_lazily():
    code = "import sys, lift_fast; assert 'lift_fast.training' not in sys.modules; import lift_fast.training as t;"
    code += (
        "assert 'lift_fast.training.lift' not in sys.modules and 'timm' not in sys.modules; assert callable(t.split);"
    )
    code += "assert callable(t.train) and callable(t.split)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_split_is_the_function_whoever_was_imported_first():
    for first in ("lift_fast.training", *(f"lift_fast.training.{name}" for name in ("split", "loop", "lift"))):
        program = f"import {first}\nfrom lift_fast.training import split\nassert callable(split)"
        subprocess.run([sys.executable, "-c", program], check=True)


def test_settings_keep_whole_numbers_as_pythons_own(tmp_path):
    given = {"layer": -1, "epochs": 2, "batch_size": 4, "seed": 7, "workers": 0}
    settings = TrainingSettings(data=tmp_path, out=tmp_path, **{name: np.int64(value) for name, value in given.items()})
    assert {name: (value, type(value)) for name, value in settings.as_dict().items() if name in given} == {
        name: (value, int) for name, value in given.items()
    }


@pytest.mark.parametrize(("name", "value"), [("workers", 100_000), ("seed", 2**63)])
def test_settings_beyond_any_machine_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be at most"):
        TrainingSettings(data=tmp_path, out=tmp_path, **{name: value})
