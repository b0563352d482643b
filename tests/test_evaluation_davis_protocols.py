"""The two published protocols on DAVIS, the LiFT paper's and DINO's own, against both written down step by step."""

import json

import numpy as np
import pytest
import torch
from evaluation_data import (
    MEAN,
    OPTIONS,
    STD,
    network_of,
    patch_features,
    save_mask,
    shapes,
    tiny_backbone,
    write_davis,
    write_list,
    write_sequence,
)
from PIL import Image
from test_evaluation_davis import slow_predict
from test_evaluation_davis_runs import command

from lift_fast import LiFT
from lift_fast.backbones import FrozenViT
from lift_fast.evaluation.davis import Davis, DavisError, Network, PropagationOptions, frames, predict, score_sequence
from lift_fast.evaluation.davis import dataset as reader
from lift_fast.evaluation.methods import Batch, build_methods
from lift_fast.testing import randomize

pytestmark = pytest.mark.usefixtures("one_thread")


def both(root, method, network, options, **slow):
    """Masks of the first sequence by the package and by the slow protocol."""
    dataset = Davis(root)
    video = dataset.sequence(dataset.names[0])
    mask = reader.first_annotation(video)
    with torch.no_grad():
        expected, _ = slow_predict(
            root / "JPEGImages/480p" / video.name,
            root / "Annotations/480p" / video.name / "00000.png",
            method,
            options.size,
            options.queue,
            options.radius,
            options.topk,
            options.temperature,
            **slow,
        )
    return [found for (found,) in predict(video.frames, mask, network, options)][1:], expected


@pytest.mark.parametrize(
    ("name", "size", "cells", "enlarged"),
    [
        ("backbone", 64, 4, 64),
        ("lift", 64, 8, 128),
        ("stride-8", 64, 7, 112),
        ("backbone", 56, 3, 48),
        ("lift", 56, 6, 96),
    ],
)
def test_labels_are_enlarged_by_the_patch_size_and_laid_over_the_whole_frame(tmp_path, name, size, cells, enlarged):
    write_davis(tmp_path, 3, sequences=1, size=(61, 97))
    backbone = tiny_backbone()
    (method,) = build_methods([name], backbone, randomize(LiFT(24, 16), 1).eval().double())
    options = PropagationOptions(size=size, queue=3, radius=2, topk=3)

    def features(imgs):
        found = method(Batch(imgs.double())).map
        assert found.shape[2] * 16 == enlarged == 16 * cells
        return found

    network = Network([method], MEAN, STD, backbone.patch_size, dtype=torch.float64)
    ours, theirs = both(tmp_path, features, network, options, patch=16)
    for found, expected in zip(ours, theirs, strict=True):
        assert np.array_equal(found, expected)
    covering = PropagationOptions(size=size, queue=3, radius=2, topk=3, placement="cover")
    covered, _ = both(tmp_path, features, network, covering, patch=16)
    same = all(np.array_equal(a, b) for a, b in zip(ours, covered, strict=True))
    # Grids of three cells leave little to differ in.
    assert same == (enlarged == size) or cells == 3


# DINO's frames, pixel by pixel and in whole numbers.


def dino_pixels(pixels, height, width):
    out = np.zeros((height, width, 3), np.uint8)

    def between(index, old, new):
        at = np.float32((index + 0.5) * (old / new) - 0.5)
        low = int(np.floor(at))
        part = np.float32(at - np.float32(low))
        if low < 0:
            low, part = 0, np.float32(0)
        if low >= old - 1:
            low, part = old - 1, np.float32(0)
        return low, min(low + 1, old - 1), round(float(np.float32(1) - part) * 2048), round(float(part) * 2048)

    for i in range(height):
        upper, lower, above, below = between(i, pixels.shape[0], height)
        for j in range(width):
            left, right, before, after = between(j, pixels.shape[1], width)
            for c in range(3):
                rows = [int(pixels[y, left, c]) * before + int(pixels[y, right, c]) * after for y in (upper, lower)]
                out[i, j, c] = (((above * (rows[0] >> 4)) >> 16) + ((below * (rows[1] >> 4)) >> 16) + 2) >> 2
    return out


def dino_frame(path, size):
    image = np.asarray(Image.open(path).convert("RGB"))
    height, width = image.shape[:2]
    if height > width:
        tw, th = size, int(((size * height) / width // 64) * 64)
    else:
        th, tw = size, int(((size * width) / height // 64) * 64)
    small = dino_pixels(image, th, tw).astype(np.float32) / 255
    small = (small - np.float32([0.485, 0.456, 0.406])) / np.float32([0.228, 0.224, 0.225])
    return torch.from_numpy(small).permute(2, 0, 1)[None].double()


@pytest.mark.parametrize("size", [(40, 120), (125, 61), (80, 150)])
def test_dino_protocol(tmp_path, size):
    # A seed at which no two channels of a pixel are equal up to rounding.
    write_davis(tmp_path, 6, sequences=1, size=size, frames=4)
    key = tiny_backbone()
    backbone = FrozenViT(key.model, facet="final", head_order="interleaved")
    (method,) = build_methods(["backbone"], backbone)
    options = PropagationOptions(size=64, queue=2, radius=2, topk=3, protocol="dino")
    longer = 64 * max(size) / min(size) // 64 * 64

    def features(imgs):
        # All of timm's forward pass: every block, the final norm, then the class token is dropped.
        assert sorted(imgs.shape[2:]) == sorted((64, longer))
        tokens = key.model.forward_features(imgs)[:, 1:]
        return tokens.transpose(1, 2).unflatten(2, (imgs.shape[2] // 16, imgs.shape[3] // 16))

    # timm's own way to other grids.
    key.model.dynamic_img_size = True
    key.model.patch_embed.strict_img_size = False
    key.model.patch_embed.flatten = False
    key.model.patch_embed.output_fmt = "NHWC"
    network = Network([method], frames.DINO_MEAN, frames.DINO_STD, backbone.patch_size, dtype=torch.float64)
    ours, theirs = both(tmp_path, features, network, options, patch=16, read=dino_frame)
    for found, expected in zip(ours, theirs, strict=True):
        assert np.array_equal(found, expected)


def test_final_tokens_are_the_norm_of_the_tokens():
    backbone = tiny_backbone()
    imgs = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    final, token = (FrozenViT(backbone.model, facet=facet)(imgs) for facet in ("final", "token"))
    expected = backbone.model.forward_features(imgs)[:, 1:]
    torch.testing.assert_close(final, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(token, expected)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((480, 854), (480, 832)),
        ((854, 480), (832, 480)),
        ((480, 910), (480, 896)),
        ((1080, 1920), (480, 832)),
        ((9, 9), (480, 448)),
    ],
)
def test_dino_frame_sizes(size, wanted):
    assert frames.frame_size(size, 480, "dino") == wanted
    assert frames.frame_size(size, 448, "lift") == (448, 448)
    with pytest.raises(ValueError, match="at least 64 pixels"):
        frames.frame_size((9, 9), 63, "dino")


@pytest.mark.parametrize("size", [(7, 11), (40, 30), (11, 64)])
def test_bytes_are_resized_in_whole_numbers(size):
    pixels = np.random.default_rng(1).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    found = frames.resize_bytes(pixels, size)
    assert np.array_equal(found, dino_pixels(pixels, *size))
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].double(), size, mode="bilinear"
    )
    assert float((torch.from_numpy(found).permute(2, 0, 1) - exact[0]).abs().max()) < 1


def test_frames_without_leading_zeros_come_in_their_order(tmp_path):
    frames, masks = shapes(2, frames=12)
    write_sequence(tmp_path, "counted", frames, masks)
    write_list(tmp_path, ["counted"])
    folders = [tmp_path / kind / "480p/counted" for kind in ("JPEGImages", "Annotations")]
    padded = [found for (found,) in predict(*ingredients(tmp_path))]
    for folder in folders:
        for path in sorted(folder.iterdir()):
            path.rename(path.with_name(f"{int(path.stem) + 1}{path.suffix}"))
    video = Davis(tmp_path).sequence("counted")
    assert [frame.name for frame in video.frames] == [f"{t}.jpg" for t in range(1, 13)]
    for found, (expected,) in zip(padded, predict(*ingredients(tmp_path)), strict=True):
        assert np.array_equal(found, expected)


def ingredients(root):
    video = Davis(root).sequence("counted")
    return video.frames, reader.first_annotation(video), network_of(patch_features(0)), OPTIONS


def test_masks_of_0_and_255(tmp_path):
    write_davis(tmp_path, 2, sequences=1)
    folder = tmp_path / "Annotations/480p/shape-0"
    for path in folder.iterdir():
        save_mask(path, np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8))
    video = Davis(tmp_path).sequence("shape-0")
    with pytest.raises(DavisError, match=r"00000\.png holds no object: all values but 0 are 255, which is void"):
        reader.first_annotation(video)
    binary = Davis(tmp_path, binary_masks=True).sequence("shape-0")
    first = reader.first_annotation(binary)
    assert np.array_equal(first == 1, np.asarray(Image.open(folder / "00000.png")) == 255)
    assert set(np.unique(first)) == {0, 1}
    # Annotations and predictions alike may hold 255 or 1 for the object.
    out = tmp_path / "out"
    out.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        save_mask(out / path.name, reader.read_mask(path, binary=True) * (255 if number % 2 else 1))
    assert float(score_sequence(binary, out).j.min()) == 1


def test_unknown_choices_are_named():
    for options in ({"protocol": "mocha"}, {"placement": "centre"}):
        with pytest.raises(ValueError, match=rf"{next(iter(options))} must be .* or .*, got"):
            PropagationOptions(**options)
    with pytest.raises(ValueError, match="at least 64 pixels"):
        PropagationOptions(size=60, protocol="dino")


def test_command_names_the_protocol(tmp_path, capsys):
    root = write_davis(tmp_path / "davis", sequences=1)
    # Facet, method and size are the protocol's own.
    common = ["--root", root, "--model", "vit_tiny_patch16_224", "--random-weights", "--threads", "1", "--quiet"]
    assert command(*common, "--masks", tmp_path / "dino", "--protocol", "dino", "--out", tmp_path / "d.json") == 0
    said = capsys.readouterr().out
    assert "DAVIS 2017, val, DINO's protocol" in said
    result = json.loads((tmp_path / "d.json").read_text())
    assert list(result["summary"]) == ["backbone"]
    options = result["options"]
    assert (options["protocol"], options["placement"], options["size"]) == ("dino", "stretch", 480)
    assert result["record"]["facet"] == "final"
    assert result["record"]["image_branch"] == "published"
    written = json.loads((tmp_path / "dino/backbone/predictions.json").read_text())
    assert (written["protocol"], written["placement"], written["facet"]) == ("dino", "stretch", "final")
    # Masks of the other protocol, or of another placement, are not mixed with these.
    assert command(*common, "--masks", tmp_path / "dino", "--method", "backbone", "--size", "480") == 2
    assert "(facet, protocol)" in capsys.readouterr().err
    assert command(*common, "--masks", tmp_path / "dino", "--protocol", "dino", "--placement", "cover") == 2
    assert "(placement)" in capsys.readouterr().err
    assert command(*common, "--masks", tmp_path / "dino", "--protocol", "dino", "--size", "40") == 2
    assert "at least 64 pixels" in capsys.readouterr().err
    dino = ["--masks", tmp_path / "both", "--protocol", "dino", "--size", "64", "--random-lift", "--predict-only"]
    assert command(*common, *dino) == 0
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["backbone", "bilinear", "lift"]
    lift = ["--masks", tmp_path / "lift", "--random-lift", "--size", "56", "--out", tmp_path / "l.json"]
    assert command(*common, *lift) == 0
    capsys.readouterr()
    result = json.loads((tmp_path / "l.json").read_text())
    assert list(result["summary"]) == ["backbone", "bilinear", "lift"]
    assert (result["options"]["protocol"], result["record"]["facet"]) == ("lift", "key")
    assert command(*common, *lift, "--image-branch", "aligned") == 2
    assert "(image_branch)" in capsys.readouterr().err


def test_command_takes_binary_masks(tmp_path, capsys):
    root = write_davis(tmp_path / "davis", 2, sequences=1)
    for path in (root / "Annotations/480p/shape-0").iterdir():
        save_mask(path, np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8))
    options = ["--root", root, "--masks", tmp_path / "m", "--model", "vit_tiny_patch16_224", "--random-weights"]
    options += ["--threads", "1", "--quiet", "--method", "backbone", "--size", "64"]
    assert command(*options) == 1
    said = capsys.readouterr()
    assert "--binary-masks" in said.err
    assert said.out == ""
    assert command(*options, "--binary-masks", "--out", tmp_path / "r.json") == 0
    assert "DAVIS 2017, val, binary masks: 1 objects in 1 sequences" in capsys.readouterr().out
    (root / "ImageSets/2017").rename(root / "ImageSets/2016")
    assert command(*options, "--binary-masks", "--year", "2016") == 0
    assert "DAVIS 2016, val, binary masks" in capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["options"]["binary_masks"], result["summary"]["backbone"]["objects"]) == (True, 1)


def test_dinos_protocol_says_why_it_has_no_lift(tmp_path, capsys):
    """The demonstration's was trained on keys: it is not taken unasked, and not without a remark."""
    root = write_davis(tmp_path / "davis", 3, sequences=1)
    options = ["--root", root, "--masks", tmp_path / "m", "--threads", "1", "--protocol", "dino", "--size", "64"]
    assert command(*options, "--method", "backbone", "lift") == 2
    said = capsys.readouterr().err
    assert "lift needs a LiFT (the demonstration's was trained on the last block's keys, not on final)" in said
    assert "give --lift FILE or --random-lift" in said
    assert command(*options, "--method", "lift", "--no-lift") == 2
    assert "lift needs a LiFT; give --lift FILE" in capsys.readouterr().err
    assert command(*options, "--method", "lift", "--lift", "lift_demo_vitt16") == 0
    assert "was trained on the keys of the last block" in capsys.readouterr().err
