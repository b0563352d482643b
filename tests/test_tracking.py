"""Objects and points through videos of known motion; the masks of DAVIS's evaluation; resumed trackers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from moving import camera, carried, pasted
from PIL import Image

from lift_fast import ViTLiFTExtractor
from lift_fast.demonstration import BACKBONE, LIFT
from lift_fast.evaluation.davis import Network, PropagationOptions, jaccard, predict
from lift_fast.evaluation.methods import Features
from lift_fast.testing import poisoned_outputs
from lift_fast.tracking import FrameError, Tracker, track
from lift_fast.tracking.labels import hard_mask, object_mask
from lift_fast.tracking.points import PointMatcher, as_points

pytestmark = pytest.mark.usefixtures("one_thread")
CORNERS = np.array([[40.0, 30.0], [90.0, 40.0], [60.0, 66.0]])


@pytest.fixture(scope="module")
def demonstration():
    return ViTLiFTExtractor(BACKBONE, LIFT, device="cpu", silent=True)


@pytest.fixture(scope="module")
def backbone():
    return ViTLiFTExtractor(BACKBONE, device=None, silent=True)


@pytest.mark.parametrize("numbers", [(1, 2), (2, 200)])
def test_masks_are_those_of_the_evaluation(demonstration, tmp_path, numbers):
    images, masks = pasted(6, (61, 83), objects=2)
    first = np.array([0, *numbers], dtype=np.uint8)[masks[0]]
    for t, image in enumerate(images):
        image.save(tmp_path / f"{t}.png")
    frames = [tmp_path / f"{t}.png" for t in range(6)]

    def method(batch):
        with torch.no_grad():
            found = demonstration.matching_map(batch.imgs)
        return Features(found, demonstration.covered(*batch.imgs.shape[2:]))

    network = Network([method], demonstration.mean, demonstration.std, 16)
    options = PropagationOptions(size=96, queue=3, radius=4, topk=5, batch_size=1, placement="cover")
    wanted = [found for (found,) in predict(frames, first, network, options)]
    options = {"size": (96, 96), "queue": 3, "radius": 4, "topk": 5}
    found = [one.mask for one in track(tmp_path, first, extractor=demonstration, **options)]
    assert len(found) == 6
    assert set(np.unique(found[-1])) == {0, *numbers}
    for mine, theirs in zip(found, wanted, strict=True):
        assert np.array_equal(mine, theirs)


def test_object_moves_over_a_photograph(demonstration):
    images, masks = pasted(8, (120, 160), objects=2)
    with poisoned_outputs():
        found = list(track(images, masks[0], extractor=demonstration, size=224))
    assert [one.index for one in found] == list(range(8))
    for t, one in enumerate(found):
        assert one.mask.shape == (120, 160)
        assert np.array_equal(np.asarray(one.image), np.asarray(images[t]))
        for number in (1, 2):
            assert jaccard(masks[t] == number, one.mask == number) > (0.99 if t == 0 else 0.7)
    # The first masks as they are would not do.
    assert jaccard(masks[0] == 1, masks[-1] == 1) < 0.35


def test_points_follow_a_camera(demonstration):
    images, matrices = camera(8, (96, 128))
    grid = np.stack(np.meshgrid(np.arange(16, 113, 16), np.arange(16, 81, 16)), -1).reshape(-1, 2) + 0.25
    with poisoned_outputs():
        found = [one.points for one in track(images, points=grid, extractor=demonstration, size=224)]
    assert np.allclose(found[0].xy, grid, atol=1e-3)
    assert found[0].visible.all()
    errors, there, seen = [], [], []
    for t in range(1, 8):
        truth = carried(grid, matrices, t)
        errors.append(np.linalg.norm(found[t].xy - truth, axis=1))
        there.append(((truth >= 0) & (truth < (128, 96))).all(1))
        seen.append(found[t].visible)
        assert ((found[t].confidence >= 0) & (found[t].confidence <= 1)).all()
    errors, there, seen = (np.concatenate(each) for each in (errors, there, seen))
    moved = np.linalg.norm(carried(grid, matrices, 7) - grid, axis=1)
    assert np.median(moved) > 10
    assert np.median(errors[there]) < 1.5
    assert (errors[there & seen] < 4).mean() > 0.9
    assert seen[there].mean() > 0.6


def test_patterns_turn_and_grow_with_the_camera(demonstration, monkeypatch):
    images, matrices = camera(14, (96, 128), zoom=0.03, turn=0.05)
    grid = np.stack(np.meshgrid(np.arange(32, 97, 16), np.arange(24, 73, 16)), -1).reshape(-1, 2)
    truth = carried(grid, matrices, 13)

    def last():
        *_, found = track(images, points=grid, extractor=demonstration, size=224)
        return np.median(np.linalg.norm(found.points.xy - truth, axis=1)), found.points.visible.mean()

    error, visible = last()
    assert error < 2.5
    assert visible > 0.7
    monkeypatch.setattr("lift_fast.tracking.points._TURN", 0.0)
    monkeypatch.setattr("lift_fast.tracking.points._GROWTH", 0.0)
    assert last()[0] > 2 * error


def test_point_that_leaves_is_hidden(demonstration):
    images, matrices = camera(8, (96, 128), zoom=0, turn=0, shift=(8.0, 0.0))
    points = [[12.0, 48.0], [100.0, 48.0]]
    found = [one.points for one in track(images, points=points, extractor=demonstration, size=224)]
    assert carried(points, matrices, 7)[0, 0] < -40
    assert [bool(one) for one in found[-1].visible] == [False, True]


def test_point_that_comes_back_elsewhere(demonstration):
    images = pasted(4, (96, 128), steps=(22, 0))[0]
    ground = pasted(1, (96, 128), objects=0)[0][0]
    frames = [images[0], ground, ground, images[3]]
    options = {"extractor": demonstration, "size": 224, "radius": 4}
    found = [one.points for one in track(frames, points=[[21.0, 48.0]], **options)]
    assert [bool(one.visible[0]) for one in found] == [True, False, False, True]
    # 66 pixels are 14 cells.
    assert np.abs(found[-1].xy[0] - [87, 48]).max() < 3


def test_object_that_vanishes_and_comes_back(demonstration):
    images, masks = pasted(4, (96, 128))
    ground = pasted(1, (96, 128), objects=0)[0][0]
    found = [one.mask for one in track([*images[:3], ground, ground, *images[2:]], masks[0], extractor=demonstration)]
    assert found[2].any()
    assert jaccard(masks[3] == 1, found[-1] == 1) > 0.6


def test_one_frame(demonstration):
    images, masks = pasted(1, (40, 40))
    (only,) = track(images, masks[0], points=[[3, 4]], extractor=demonstration, size=64)
    assert np.array_equal(only.mask, masks[0])
    assert np.allclose(only.points.xy, [[3, 4]], atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 13), (17, 101), (53, 31)])
@pytest.mark.parametrize("lift", [True, False])
def test_tiny_and_odd_sizes(demonstration, backbone, size, lift):
    rng = np.random.default_rng(size[0])
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(3)]
    mask = np.ones(size, dtype=np.uint8)
    points = [[size[1] - 1, size[0] - 1], [0, 0]]
    made = demonstration if lift else backbone
    found = list(track(images, mask, points, extractor=made, size=32))
    assert [one.mask.shape for one in found] == [size] * 3
    for one in found:
        assert np.isfinite(one.points.xy).all()
        # The centre of the outermost cell, half a cell from the border.
        assert (one.points.xy >= -0.5).all()
        assert (one.points.xy <= np.array(size[::-1]) - 0.5).all()
    assert found[-1].mask.any()


def test_the_longer_side_is_bounded(demonstration):
    image = np.zeros((32, 2000, 3), dtype=np.uint8)
    assert Tracker(image, None, [[1, 1]], extractor=demonstration, size=64).frame_size == (32, 1792)
    assert Tracker(image, None, [[1, 1]], extractor=demonstration, size=64, max_side=1024).frame_size == (16, 1024)
    with pytest.raises(ValueError, match="too long"):
        Tracker(image, None, [[1, 1]], extractor=demonstration, max_side=100)


def test_still_video_stays(demonstration):
    image = camera(1, (64, 96))[0][0]
    at = np.array([[0.0, 0.0], [95.0, 63.0], [47.3, 20.8]])
    for one in track([image] * 4, points=at, extractor=demonstration, size=128):
        # Between the cells of 5.3 pixels; the outermost lie half of one from the border.
        assert np.abs(one.points.xy - at).max() < 4
        assert one.points.visible.all()


def test_an_object_between_the_sampled_pixels_keeps_a_cell(demonstration):
    mask = np.zeros((128, 128), dtype=np.uint8)
    mask[50, 70] = 9
    mask[100:, :] = 4
    tracker = Tracker(np.zeros((128, 128, 3), dtype=np.uint8), mask, extractor=demonstration, size=64)
    assert (tracker.objects, tracker.lost) == ([4, 9], [])
    # Two objects of one pixel in the only cell of each other.
    mask[:] = 0
    mask[0, :2] = 1, 2
    assert Tracker(mask[:, :, None] * np.ones((1, 1, 3), dtype=np.uint8), mask, size=16).lost == [2]


def test_resumed_tracker_goes_on_alike(demonstration):
    images, masks = pasted(9, (60, 80), objects=2)
    options = {"extractor": demonstration, "size": 96, "queue": 3}
    whole = list(track(images, masks[0], CORNERS / 2, **options))
    for stop in (1, 2, 6):
        tracker = Tracker(images[0], masks[0], CORNERS / 2, **options)
        for image in images[1:stop]:
            tracker.step(image)
        again = Tracker(images[0], masks[0], CORNERS / 2, **options)
        again.restore(tracker.state())
        for image, wanted in zip(images[stop:], whole[stop:], strict=True):
            found = again.step(image)
            assert found.index == wanted.index
            assert np.array_equal(found.mask, wanted.mask)
            for name in ("xy", "confidence", "visible"):
                assert np.array_equal(getattr(found.points, name), getattr(wanted.points, name))
    with pytest.raises(ValueError, match="does not fit"):
        Tracker(images[0], masks[0], extractor=demonstration, size=64, queue=3).restore(tracker.state())
    with pytest.raises(ValueError, match="does not fit"):
        Tracker(images[0], None, CORNERS[:2] / 2, extractor=demonstration, size=96).restore(tracker.state())


def test_state_stays_small(demonstration):
    images, masks = pasted(12, (40, 40))
    tracker = Tracker(images[0], masks[0], extractor=demonstration, size=64, queue=2)
    sizes = []
    for image in images[1:]:
        tracker.step(image)
        sizes.append(sum(tensor.numel() for tensor in tracker.state().values()))
    assert sizes[1:] == [sizes[1]] * 10


@pytest.mark.parametrize("objects", [1, 15, 16, 31, 40])
def test_many_objects_are_enlarged_in_parts(objects):
    rng = torch.Generator().manual_seed(objects)
    labels = torch.rand(objects + 1, 5, 7, generator=rng) * (torch.rand(objects + 1, 5, 7, generator=rng) < 0.4)
    labels[objects // 2] = 0
    labels[-1] = labels[0]
    whole = torch.nn.functional.interpolate(labels[None], size=(20, 28), mode="bilinear")[0]
    assert np.array_equal(object_mask(labels, (20, 28), (0, 0, 20, 28), (31, 45)), hard_mask(whole, (31, 45)))


def test_points_against_a_slow_search(monkeypatch):
    """The best place by a loop over cells, on features without structure."""
    # The last point has left the neighbourhood; elsewhere it would be found.
    monkeypatch.setattr("lift_fast.tracking.points._SURE", 2.0)
    rng = torch.Generator().manual_seed(3)
    first = torch.nn.functional.normalize(torch.randn(8, 9, 11, generator=rng), dim=0)
    now = torch.nn.functional.normalize(torch.roll(first, (1, -2), (1, 2)) + 0.01, dim=0)
    places = torch.tensor([[5.0, 4.0], [8.0, 2.0], [0.0, 0.0]])
    found = PointMatcher(first, places, radius=3, spacing=2).step(now)
    for (x, y), xy in zip(places.int().tolist(), found.xy, strict=True):
        best = (-9.0, 0, 0)
        for v in range(9):
            for u in range(11):
                if abs(u - x) > 3 or abs(v - y) > 3:
                    continue
                steps = [(i, j) for j in (-2, 0, 2) for i in (-2, 0, 2)]
                inside = [
                    (i, j)
                    for i, j in steps
                    if 0 <= x + i < 11 and 0 <= y + j < 9 and 0 <= u + i < 11 and 0 <= v + j < 9
                ]
                fit = np.mean([float(first[:, y + j, x + i] @ now[:, v + j, u + i]) for i, j in inside])
                best = max(best, (fit - 0.001 * ((u - x) ** 2 + (v - y) ** 2), u, v))
        # The cells around the best one move it by less than half of a cell.
        assert np.abs(xy - best[1:]).max() < 0.5
    assert found.visible[0]


def test_among_equal_places_the_nearest():
    one = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(1))
    first = one.repeat(1, 5, 5)
    matcher = PointMatcher(first, torch.tensor([[14.0, 12.0], [3.0, 20.0]]), radius=12, spacing=1)
    for step in range(1, 4):
        found = matcher.step(torch.roll(first, (step, -step), (1, 2)))
        assert np.abs(found.xy - [[14 - step, 12 + step], [3 - step, 20 + step]]).max() < 0.5


def test_descriptors_that_are_not_finite_fit_nothing():
    features = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0))
    broken = features.clone()
    broken[:, 2, 3], broken[1, 0, 0] = torch.nan, torch.inf
    matcher = PointMatcher(features, torch.tensor([[3.0, 2.0], [1.0, 4.0]]), None, 1)
    found = matcher.step(broken)
    assert np.isfinite(found.xy).all()
    assert np.isfinite(found.confidence).all()
    unknown = PointMatcher(torch.full_like(features, torch.nan), torch.ones(1, 2), None, 1)
    assert not unknown.step(features).visible.any()


def test_grey_arrays_tensors_and_generators(demonstration):
    images, masks = pasted(3, (40, 56))
    grey = [np.array(image.convert("L")) for image in images]
    options = {"extractor": demonstration, "size": 64}
    wanted = [one.mask for one in track((Image.fromarray(one) for one in grey), masks[0], **options)]
    for mask in (torch.from_numpy(masks[0]), masks[0] > 0, masks[0].astype(np.int64)):
        found = [one.mask for one in track((torch.from_numpy(one) for one in grey), mask, **options)]
        assert all(np.array_equal(*pair) for pair in zip(found, wanted, strict=True))


def test_frames_of_another_size(demonstration):
    images, masks = pasted(3, (40, 56))
    images[1] = images[1].resize((40, 56))
    frames = track(images, masks[0], extractor=demonstration, size=64)
    next(frames)
    with pytest.raises(FrameError, match="frame 1: it has 40 x 56 pixels, the first frame 56 x 40"):
        next(frames)
    tracker = Tracker(images[0], masks[0], extractor=demonstration, size=64)
    with pytest.raises(FrameError):
        tracker.step(images[1])
    # As if it had not been given.
    assert tracker.step(images[2]).index == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to follow"),
        ({"mask": np.zeros((40, 40))}, "whole numbers"),
        ({"mask": np.zeros((40, 40), dtype=int)}, "marks no object"),
        ({"mask": np.ones((40, 41), dtype=int)}, "41 x 40 pixels, the first frame 40 x 40"),
        ({"mask": np.full((40, 40), 256)}, "0 to 255, got 256"),
        ({"mask": np.full((40, 40), -1)}, "0 to 255, got -1"),
        ({"mask": np.ones((1, 40, 40), dtype=int)}, "whole numbers or bool"),
        ({"points": []}, "one or more pairs"),
        ({"points": [1, 2]}, "one or more pairs"),
        ({"points": [["a", "b"]]}, "one or more pairs"),
        ({"points": [[1, 2], [1]]}, "one or more pairs"),
        ({"points": [[1, 2], [40, 3]]}, r"1 of 2 do not, the first is \[40.0, 3.0\]"),
        ({"points": [[float("nan"), 3]]}, "must lie in the first frame"),
        ({"points": [[1, 2]], "queue": -1}, "queue"),
        ({"points": [[1, 2]], "topk": 0}, "topk"),
        ({"points": [[1, 2]], "radius": 1.5}, "radius"),
        ({"points": [[1, 2]], "temperature": 0}, "temperature"),
        ({"points": [[1, 2]], "temperature": True}, "temperature"),
        ({"points": [[1, 2]], "lift_iter": -1}, "lift_iter"),
        ({"points": [[1, 2]], "size": 0}, "load_size"),
        ({"points": [[1, 2]], "size": (20000, 20000)}, "20000 x 20000"),
    ],
)
def test_bad_input(options, message, demonstration):
    with pytest.raises(ValueError, match=message):
        Tracker(np.zeros((40, 40, 3), dtype=np.uint8), extractor=demonstration, **options)


def test_points_are_read_from_anything():
    for given in ([[1, 2.5]], np.array([[1, 2.5]], dtype=np.float16), torch.tensor([[1, 2.5]], dtype=torch.bfloat16)):
        assert as_points(given, (3, 2)).tolist() == [[1, 2.5]]
