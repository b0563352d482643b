"""match_images: every form of image, positions in the images' own pixels, and the arithmetic of its result."""

import argparse

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import lift_fast.image_matching
from lift_fast import ViTLiFTExtractor, dense_match, match_images
from lift_fast.cli.options import add_model_options, build_extractor
from lift_fast.image_matching import STAGES

pytestmark = pytest.mark.usefixtures("one_thread")


def extractor(stride=None, **options):
    """Keys of the first block without position embeddings: descriptors of the patch's pixels alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(
            patch_size=8, img_size=32, embed_dim=48, depth=1, num_heads=4, num_classes=0, dynamic_img_size=True
        )
        model.pos_embed.data.zero_()
    return ViTLiFTExtractor(model=model.eval(), stride=stride, device="cpu", silent=True, **options)


def photograph(height, width, top=40, left=90):
    """A piece of a real photograph, pixel for pixel."""
    return skimage.data.chelsea()[top : top + height, left : left + width].copy()


def loaded(positions, size, image):
    """Positions in the image as it came in, as pixels of the loaded one."""
    scale = torch.tensor([image.width / size[1], image.height / size[0]])
    return (positions + 0.5) * scale - 0.5


def test_result_is_dense_match_both_ways():
    made = extractor(random_lift=True)
    a, b = photograph(41, 67), photograph(50, 33, top=60)
    found = match_images(a, b, extractor=made, size=30)
    assert (found.size_a, found.size_b) == ((41, 67), (50, 33))
    # 30 x 49 and 45 x 30, to the nearest whole patches.
    assert (found.picture_a.size, found.picture_b.size) == ((48, 32), (32, 48))
    assert (found.grid_a, found.grid_b) == ((8, 12), (12, 8))
    assert (found.covered_a, found.covered_b) == ((0, 0, 32, 48), (0, 0, 48, 32))
    with torch.no_grad():
        maps = [made.matching_map(made.preprocess(p)[0]) for p in (found.picture_a, found.picture_b)]
    assert maps[0].shape == (1, 25, 8, 12)
    there = dense_match(*maps, (32, 48), (48, 32), normalize="pixel")
    back = dense_match(maps[1], maps[0], (48, 32), (32, 48), points=there.xy, normalize="pixel")
    xy_a, xy_b = loaded(found.xy_a, found.size_a, found.picture_a), loaded(found.xy_b, found.size_b, found.picture_b)
    pixels = torch.stack(torch.meshgrid(torch.arange(48), torch.arange(32), indexing="xy"), dim=-1)
    assert (xy_a - pixels).abs().max() < 1e-4
    # The batch may round otherwise: ties aside, the same.
    same = ((xy_b - there.xy.view(32, 48, 2)).abs() < 1e-4).all(-1)
    assert same.float().mean() > 0.95
    assert (found.similarity - there.similarity.view(32, 48)).abs().max() < 1e-4
    missed = (back.xy - pixels.view(1, -1, 2)).view(32, 48, 2) / 4
    distance = missed.square().sum(-1).sqrt()
    agree = (found.distance - distance).abs() < 1e-4
    assert agree.float().mean() > 0.9
    assert ((found.confidence >= 0) & (found.confidence <= 1)).all()
    assert torch.equal(found.valid, found.distance <= 1)
    assert 0 < int(found.valid.sum()) < found.valid.numel()
    strict = dense_match(*maps, (32, 48), (48, 32), normalize="pixel", mutual=True).valid.view(32, 48)
    assert ((found.distance == 0) == strict).float().mean() > 0.95
    assert match_images(a, b, extractor=made, size=30, mutual=False).valid.all()


@pytest.mark.parametrize("stride", [None, 4])
def test_positions_are_the_images_own_pixels(stride):
    # B is what lies 16 pixels further right and 8 further down, at twice the size.
    a = photograph(72, 96)
    b = np.asarray(Image.fromarray(photograph(72, 96, 48, 106)).resize((192, 144), Image.Resampling.BICUBIC))
    found = match_images(a, b, extractor=extractor(stride), size=72, normalize="pixel")
    assert found.picture_a.size == found.picture_b.size == (96, 72)
    inner = (found.xy_a >= torch.tensor([28, 20])).all(-1) & (found.xy_a <= torch.tensor([80, 56])).all(-1)
    at = (found.xy_a - torch.tensor([16.0, 8.0]) + 0.5) * 2 - 0.5
    error = torch.linalg.vector_norm(found.xy_b - at, dim=-1)[inner]
    assert error.median() <= 1
    assert (error <= 4).float().mean() > 0.9
    assert found.valid[inner].float().mean() > 0.8


def test_overlapping_patches_leave_a_border_out():
    found = match_images(photograph(40, 64), photograph(40, 64), extractor=extractor(4), size=None, normalize="pixel")
    assert found.covered_a == (2, 2, 36, 60)
    assert found.valid.shape == (36, 60)
    assert found.xy_a[0, 0].tolist() == [2, 2]
    assert found.xy_a[-1, -1].tolist() == [61, 37]
    assert (found.xy_b - found.xy_a).abs().max() <= 2
    corner = match_images(photograph(40, 64), photograph(40, 64), extractor=extractor(4), size=None, points=[[0, 0]])
    assert corner.xy_a.tolist() == [[2, 2]]


def test_points_are_matched_as_in_the_dense_layout():
    a, b = photograph(40, 56), photograph(48, 40, 60)
    made = extractor()
    dense = match_images(a, b, extractor=made, size=48)
    rows, columns = torch.arange(200) * 48 // 200, torch.arange(200) * 7 % 64
    points = dense.xy_a[rows, columns].clamp_min(0)
    for form in (points, points.double().numpy(), points.tolist()):
        found = match_images(a, b, extractor=made, size=48, points=form)
        assert torch.equal(found.xy_a, dense.xy_a[rows, columns])
        assert torch.allclose(found.similarity, dense.similarity[rows, columns], atol=1e-5)
        # Few points are matched by other arithmetic than all: ties may fall otherwise.
        same = (found.xy_b == dense.xy_b[rows, columns]).all(-1)
        assert same.float().mean() > 0.95
        assert ((found.distance == dense.distance[rows, columns]) | ~same).float().mean() > 0.95
    # Anywhere inside: the nearest pixel centre.
    near = match_images(a, b, extractor=made, size=None, points=[[55.9, 39.9], [3.4, 3.6]])
    assert near.xy_a.tolist() == [[55, 39], [3, 4]]
    none = match_images(a, b, extractor=made, size=None, points=np.zeros((0, 2)))
    assert none.xy_b.shape == (0, 2)


def test_step_thins_out_the_dense_layout():
    a, b, made = photograph(40, 56), photograph(40, 56, 60), extractor()
    dense, thin = (match_images(a, b, extractor=made, size=None, step=n) for n in (1, 3))
    assert thin.xy_a.shape == (14, 19, 2)
    assert torch.equal(thin.xy_a, dense.xy_a[0::3, 0::3])
    assert (thin.xy_b == dense.xy_b[0::3, 0::3]).all(-1).float().mean() > 0.95


def test_every_form_of_image_gives_the_same(tmp_path):
    a, b, made = photograph(40, 48), photograph(40, 48, 60), extractor()
    Image.fromarray(a).save(tmp_path / "a.png")
    channels_first = torch.from_numpy(a).permute(2, 0, 1)
    expected = match_images(a, b, extractor=made, size=32, step=2)
    for form in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(a),
        a / 255,
        (a / 255).astype(np.float32),
        channels_first,
        channels_first.float() / 255,
        channels_first.double() / 255,
    ):
        found = match_images(form, b, extractor=made, size=32, step=2)
        assert torch.equal(found.xy_b, expected.xy_b), form
        assert torch.equal(found.confidence, expected.confidence)
    grey = a[..., 0]
    expected = match_images(np.stack([grey] * 3, -1), b, extractor=made, size=32, step=2)
    for form in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None], Image.fromarray(grey)):
        assert torch.equal(match_images(form, b, extractor=made, size=32, step=2).xy_b, expected.xy_b)


def test_exif_orientation_is_honoured(tmp_path):
    a, b, made = photograph(40, 64), photograph(40, 48, 60), extractor()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned; to be shown turned by 90 degrees clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(a))).save(tmp_path / "turned.png", exif=exif)
    expected = match_images(a, b, extractor=made, size=32)
    for form in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        found = match_images(form, b, extractor=made, size=32)
        assert found.size_a == (40, 64)
        assert torch.equal(found.xy_a, expected.xy_a)
        assert torch.equal(found.xy_b, expected.xy_b)


def test_repeated_and_left_out_lift():
    a, b, made = photograph(32, 32), photograph(32, 40), extractor(random_lift=True)
    for lift_iter in (0, 1, 2):
        found = match_images(a, b, extractor=made, size=None, step=4, lift_iter=lift_iter)
        assert found.grid_b == (4 << lift_iter, 5 << lift_iter)
        assert torch.isfinite(found.similarity).all()


def test_seconds_are_given_when_asked_for():
    a = photograph(32, 32)
    assert match_images(a, a, extractor=extractor(), step=8).seconds == {}
    seconds = match_images(a, a, extractor=extractor(), step=8, timing=True).seconds
    assert tuple(seconds) == STAGES == ("decode", "backbone", "lift", "match")
    assert all(value >= 0 for value in seconds.values())
    assert seconds["backbone"] > 0


def test_descriptors_that_are_not_finite_match_nothing():
    made = extractor()
    with torch.no_grad():
        next(made.backbone.parameters()).fill_(torch.nan)
        for parameter in made.backbone.parameters():
            parameter.fill_(torch.nan)
    found = match_images(photograph(32, 40), photograph(32, 32), extractor=made, size=None)
    assert not found.valid.any()
    assert (found.xy_b == -1).all()
    assert (found.confidence == 0).all()
    assert (found.distance == torch.inf).all()
    assert (found.similarity == -torch.inf).all()
    assert found.draw().width > 1000


def test_random_weights_are_said():
    a = photograph(32, 32)
    assert not match_images(a, a, extractor=extractor(), step=8).random_weights
    found = match_images(a, a, extractor=extractor(random_lift=True), step=8)
    assert found.random_weights
    assert found.numpy()["random_weights"]
    assert found.draw().getpixel((2, 2)) == (176, 32, 32)


def test_arrays_and_drawing():
    found = match_images(photograph(33, 50), photograph(60, 40), extractor=extractor(4), size=40, step=2)
    arrays = found.numpy()
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    assert arrays["xy_b"].dtype == arrays["confidence"].dtype == np.float32
    assert arrays["loaded_size_a"].tolist() == [found.picture_a.height, found.picture_a.width]
    sheet = found.draw(lines=5, caption="five lines")
    assert sheet.mode == "RGB"
    assert sheet.width > 1000
    points = match_images(photograph(33, 50), photograph(60, 40), extractor=extractor(), points=[[1, 2]])
    with pytest.raises(ValueError, match="leave points=None"):
        points.draw()


def test_default_extractor_is_the_command_lines_and_is_kept(monkeypatch):
    made = []

    def build(*arguments, **options):
        made.append((arguments, options))
        return extractor()

    monkeypatch.setattr(lift_fast.extractor, "ViTLiFTExtractor", build)
    lift_fast.extractor.demonstration_extractor.cache_clear()
    try:
        first = lift_fast.extractor.demonstration_extractor()
        assert lift_fast.extractor.demonstration_extractor() is first
    finally:
        lift_fast.extractor.demonstration_extractor.cache_clear()
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    arguments = parser.parse_args([])
    build_extractor(arguments)
    (here, options), (there, other) = made
    # The command line spells out what the extractor reads off the backbone.
    assert here == there == ("demo_vitt16", "lift_demo_vitt16")
    assert options == {"device": None, "silent": True, "dtype": "auto"}
    assert other["device"] is None
    assert arguments.size == match_images.__kwdefaults__["size"]


GOOD = np.zeros((16, 16, 3), np.uint8)
BAD = {
    "missing": ({"a": "nowhere.jpg"}, FileNotFoundError, "nowhere.jpg"),
    "no image": ({"a": __file__}, ValueError, r"test_image_matching\.py cannot be read"),
    "type": ({"b": [[1]]}, TypeError, "b must be a path.*got list"),
    "array shape": ({"a": np.zeros((3, 16, 16), np.uint8)}, ValueError, r"a must be \[H, W, 3\].*got \[3, 16, 16\]"),
    "tensor shape": ({"b": torch.zeros(16, 16, 3)}, ValueError, r"b must be \[3, H, W\].*got \[16, 16, 3\]"),
    "batch": ({"b": torch.zeros(1, 3, 16, 16)}, ValueError, r"got \[1, 3, 16, 16\]"),
    "empty": ({"a": np.zeros((0, 4, 3), np.uint8)}, ValueError, r"got \[0, 4, 3\]"),
    "integers": ({"a": np.zeros((16, 16, 3), np.int64)}, ValueError, "uint8 or floating point.*int64"),
    "normalised": ({"a": np.full((16, 16, 3), -0.5)}, ValueError, "0 to 1, got -0.5"),
    "NaN": ({"a": torch.full((3, 16, 16), torch.nan)}, ValueError, "0 to 1, got nan"),
    "small": ({"a": GOOD[:4], "size": None}, ValueError, "patch"),
    "size": ({"size": -3}, ValueError, "load_size"),
    "normalize": ({"normalize": None}, ValueError, "normalize must be"),
    "step": ({"step": 0}, ValueError, "step must be an integer >= 1, got 0"),
    "lift_iter": ({"lift_iter": -1}, ValueError, "lift_iter must be an integer >= 0"),
    "both": ({"step": 2, "points": [[1, 1]]}, ValueError, "does not apply to points"),
    "points shape": ({"points": [1, 2, 3]}, ValueError, r"points must be \[P, 2\].*got \[3\]"),
    "points words": ({"points": [["x", "y"]]}, ValueError, "points must be"),
    "outside": ({"points": [[1, 1], [16, 3]]}, ValueError, r"1 of 2 do not, the first is \[16.0, 3.0\]"),
    "NaN point": ({"points": [[float("nan"), 1]]}, ValueError, "inside A"),
    "extractor": ({"extractor": "dino_vits16"}, TypeError, "extractor must be a ViTLiFTExtractor or None, got str"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        match_images(**{"a": GOOD, "b": GOOD, "extractor": extractor(), **options})


def test_truncated_pillow_image_is_named(tmp_path):
    Image.fromarray(photograph(64, 64)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    with Image.open(tmp_path / "a.jpg") as image, pytest.raises(ValueError, match="b cannot be read as an image"):
        match_images(GOOD, image, extractor=extractor())
