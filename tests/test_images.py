"""Reading and preparing images: modes, orientation, sizes, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lift_fast.images import as_image, list_images, preprocess, read_image, resize, to_tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 6, columns * 4, (rows + columns) * 2], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "1", "LA", "RGBA"])
def test_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(gradient()).convert(mode).save(file)
    image = read_image(file)
    assert (image.mode, image.size) == ("RGB", (60, 40))
    if mode in ("RGB", "RGBA"):
        assert np.array_equal(np.asarray(image), gradient())


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    rgba = np.dstack([gradient(), np.zeros((40, 60), np.uint8)])
    rgba[:, 30:, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))
    assert (pixels[:, :30] == 255).all()
    assert np.array_equal(pixels[:, 30:], gradient()[:, 30:])
    palette = Image.fromarray(gradient()).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    palette.save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_and_floats_checked(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))[..., 0]
    assert np.abs(pixels - values / 257.0).max() <= 0.5
    Image.fromarray((values / 65535).astype(np.float32)).save(tmp_path / "f.tif")
    assert np.abs(np.asarray(read_image(tmp_path / "f.tif"))[..., 0] - values / 257.0).max() <= 1
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "g.tif")
    with pytest.raises(ValueError, match=r"g\.tif.*0 to 1, got 0 to 65535"):
        read_image(tmp_path / "g.tif")


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient()).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png")
    assert image.size == (40, 60)
    assert np.array_equal(np.asarray(image), np.rot90(gradient(), -1))


def test_channels_in_the_wrong_place() -> None:
    first, last = np.zeros((3, 40, 50), np.uint8), np.zeros((40, 50, 1), np.uint8)
    with pytest.raises(ValueError, match=r"got \[3, 40, 50\]; move the channels last$"):
        as_image(first)
    with pytest.raises(ValueError, match=r"got \[40, 50, 1\]; move the channels first$"):
        as_image(torch.from_numpy(last))
    with pytest.raises(ValueError, match=r"got \[40, 50, 4\]$"):
        as_image(np.zeros((40, 50, 4), np.uint8))


def test_files_that_are_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(gradient()).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").touch()
    for name in ("cut.jpg", "text.jpg", "empty.jpg"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match="is a folder"):
        read_image(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"whole\.jpg is too large.*set_max_pixels\)"):
        read_image(tmp_path / "whole.jpg")


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    (tmp_path / "store" / "cats").mkdir(parents=True)
    (tmp_path / "store" / "cats" / "a.jpg").touch()
    root = tmp_path / "classes"
    root.mkdir()
    (root / "cats").symlink_to(tmp_path / "store" / "cats")
    (root / "circle").symlink_to(root)
    (root / "nowhere.jpg").symlink_to(tmp_path / "nothing")
    (root / "itself.jpg").symlink_to("itself.jpg")
    (root / "one").symlink_to("other")
    (root / "other").symlink_to("one")
    assert list_images(root) == [root / "cats" / "a.jpg"]


def test_list_images(tmp_path: Path) -> None:
    (tmp_path / "b" / ".hidden").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name in ("b/z.PNG", "a.jpg", "notes.txt", ".c.jpg", "b/.hidden/d.jpg"):
        (tmp_path / name).touch()
    assert list_images(tmp_path) == [tmp_path / "a.jpg", tmp_path / "b" / "z.PNG"]
    assert list_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]
    with pytest.raises(ValueError, match="no images in"):
        list_images(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_images(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("size", "load_size", "expected"),
    [
        ((60, 40), 20, (30, 20)),
        ((40, 60), 20, (20, 30)),
        ((61, 40), 224, (341, 224)),
        ((50, 50), 30, (30, 30)),
        ((60, 40), (10, 70), (70, 10)),
        ((60, 40), None, (60, 40)),
        ((60, 40), 40, (60, 40)),
    ],
)
def test_sizes_follow_torchvision(size: tuple[int, int], load_size: object, expected: tuple[int, int]) -> None:
    image = Image.fromarray(gradient(size[1], size[0]))
    assert resize(image, load_size).size == expected  # type: ignore[arg-type]
    transforms = pytest.importorskip("torchvision.transforms")
    if load_size is not None:
        theirs = transforms.Resize(load_size, interpolation=transforms.InterpolationMode.LANCZOS)(image)
        assert np.array_equal(np.asarray(resize(image, load_size)), np.asarray(theirs))  # type: ignore[arg-type]


@pytest.mark.parametrize("load_size", [0, -5, 2.5, "224", (10,), (0, 10), True])
def test_bad_sizes(load_size: object) -> None:
    with pytest.raises(ValueError, match="load_size"):
        resize(Image.fromarray(gradient()), load_size)  # type: ignore[arg-type]


def test_normalisation() -> None:
    image = Image.fromarray(gradient())
    out = preprocess(image, None, MEAN, STD)
    assert (out.shape, out.dtype, out.is_contiguous()) == ((1, 3, 40, 60), torch.float32, True)
    expected = (gradient().astype(np.float64) / 255 - MEAN) / STD
    assert np.abs(out[0].permute(1, 2, 0).numpy() - expected).max() < 1e-6
    assert torch.equal(
        to_tensor(image.convert("L").convert("RGB"), MEAN, STD), to_tensor(image.convert("L"), MEAN, STD)
    )
    with pytest.raises(ValueError, match="three values"):
        to_tensor(image, (0.5,), STD)
