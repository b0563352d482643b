"""DAVIS 2017 on generated data sets in the original layout, against the protocol written down step by step."""

import math

import numpy as np
import pytest
import torch
from evaluation_data import (
    MEAN,
    OPTIONS,
    PALETTE,
    STD,
    masks_of,
    patch_features,
    save_mask,
    write_davis,
    write_list,
    write_sequence,
)
from PIL import Image

from lift_fast.evaluation.davis import (
    Davis,
    LabelPropagation,
    PropagationOptions,
    score_sequence,
)
from lift_fast.evaluation.davis import dataset as reader
from lift_fast.tracking.labels import cell_labels, enlarge_covered, hard_mask, normalize_channels
from lift_fast.tracking.masks import usual_palette, write_mask

pytestmark = pytest.mark.usefixtures("one_thread")


# The protocol once more, as its description reads: nothing here comes from the package.


def slow_frame(path, size):
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    pixels = (np.asarray(image, dtype=np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def slow_predict(folder, annotation, features, size, queue_length, radius, topk, temperature, patch=8, read=slow_frame):
    """Masks of all frames but the first, and their soft labels."""

    def frame_features(path):
        return features(read(path, size))[0]

    first_mask = Image.open(annotation)
    width, height = first_mask.size
    count = int(np.asarray(first_mask).max())
    frames = sorted(folder.iterdir())
    first = frame_features(frames[0])
    _, h, w = first.shape
    small = np.asarray(first_mask.resize((w, h), Image.Resampling.NEAREST))
    first_labels = torch.stack([torch.from_numpy(small == number) for number in range(count + 1)]).to(first.dtype)
    near = torch.zeros(h, w, h, w, dtype=torch.bool)
    for i in range(h):
        for j in range(w):
            near[i, j, max(i - radius, 0) : i + radius + 1, max(j - radius, 0) : j + radius + 1] = True
    near = near.reshape(h * w, h * w)
    queue, masks, soft = [], [], []
    for path in frames[1:]:
        target = frame_features(path)
        context = [(first, first_labels), *queue]
        affinity = []
        for source, _ in context:
            a, b = (maps / maps.norm(dim=0, keepdim=True) for maps in (target, source))
            cosine = a.flatten(1).T @ b.flatten(1)
            affinity.append(torch.exp(cosine / temperature) * near)
        affinity = torch.cat(affinity, dim=1)
        kept = torch.zeros_like(affinity).scatter_(1, affinity.topk(topk, dim=1).indices, 1)
        affinity = affinity * kept
        affinity = affinity / affinity.sum(1, keepdim=True)
        sources = torch.cat([labels.flatten(1) for _, labels in context], dim=1)
        labels = (sources @ affinity.T).view(count + 1, h, w)
        queue.append((target, labels))
        if len(queue) > queue_length:
            queue.pop(0)
        enlarged = torch.nn.functional.interpolate(labels[None], scale_factor=patch, mode="bilinear")[0]
        for channel in enlarged:
            if channel.max() > 0:
                channel -= channel.min().clone()
                channel /= channel.max().clone()
        winner = Image.fromarray(enlarged.max(0).indices.numpy().astype(np.uint8))
        masks.append(np.asarray(winner.resize((width, height), Image.Resampling.NEAREST)))
        soft.append(labels)
    return masks, soft


def slow_scores(annotations, predictions):
    """{(object, measure): value} of one sequence, by the definitions."""
    truth, guess = annotations[1:-1], predictions[1:-1]
    scores = {}
    height, width = truth[0].shape
    radius = math.ceil(0.008 * math.sqrt(height**2 + width**2))
    for number in range(1, annotations[0].max() + 1):
        j, f = [], []
        for a, b in zip(truth, guess, strict=True):
            a, b = a == number, b == number
            j.append((a & b).sum() / (a | b).sum() if (a | b).any() else 1.0)
            f.append(slow_f(a, b, radius))
        for name, values in (("J", j), ("F", f)):
            marks = [math.floor(1 + (len(values) - 1) * i / 4 + 0.5) - 1 for i in range(5)]
            scores[number, f"{name}-Mean"] = np.mean(values)
            scores[number, f"{name}-Recall"] = np.mean([value > 0.5 for value in values])
            scores[number, f"{name}-Decay"] = np.mean(values[: marks[1] + 1]) - np.mean(values[marks[3] :])
        scores[number, "J&F-Mean"] = (scores[number, "J-Mean"] + scores[number, "F-Mean"]) / 2
    return scores


def slow_f(a, b, radius):
    edges = []
    for mask in (b, a):
        edge = np.zeros_like(mask)
        edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
        edge[:-1] |= mask[:-1] != mask[1:]
        edge[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
        edges.append(np.argwhere(edge))
    if not len(edges[0]) or not len(edges[1]):
        return float(len(edges[0]) == len(edges[1]))
    square = ((edges[0][:, None] - edges[1][None]) ** 2).sum(-1) <= radius**2
    precision, recall = square.any(1).mean(), square.any(0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def run_both(root, features, options=OPTIONS):
    """For each sequence (masks, soft labels) of the package and of the slow protocol."""
    dataset = Davis(root)
    for name in dataset.names:
        sequence = dataset.sequence(name)
        mask = reader.first_annotation(sequence)
        masks = masks_of(sequence, mask, features, options)
        slow = slow_predict(
            root / "JPEGImages/480p" / name,
            root / "Annotations/480p" / name / "00000.png",
            features,
            options.size,
            options.queue,
            options.radius,
            options.topk,
            options.temperature,
        )
        yield sequence, masks, slow


@pytest.mark.parametrize(("seed", "size"), [(0, (60, 96)), (1, (60, 96)), (2, (90, 70)), (3, (48, 131))])
def test_the_whole_protocol_in_float64(tmp_path, seed, size):
    # Rounding decides nothing here: masks and scores are the same, not nearly the same.
    write_davis(tmp_path / "davis", seed, size=size)
    for sequence, masks, (slow, _) in run_both(tmp_path / "davis", patch_features(seed, dtype=torch.float64)):
        assert len(masks) == len(slow) + 1 == 6
        for ours, theirs in zip(masks[1:], slow, strict=True):
            assert np.array_equal(ours, theirs)
        folder = tmp_path / "out" / sequence.name
        folder.mkdir(parents=True)
        for frame, mask in zip(sequence.frames, masks, strict=True):
            write_mask(folder / f"{frame.stem}.png", mask, PALETTE)
        annotations = [np.asarray(Image.open(sequence.annotation(frame))) for frame in sequence.frames]
        expected = slow_scores(annotations, masks)
        for number, scores in enumerate(score_sequence(sequence, folder, threads=2).objects(), start=1):
            for name, value in scores.items():
                assert value == pytest.approx(expected.pop((number, name)), abs=1e-12)
        assert not expected


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_whole_protocol_in_float32(tmp_path, seed):
    # In float32 a pair of keys that ties for the last place within rounding may change places, and labels with them.
    write_davis(tmp_path, seed, sequences=1)
    features = patch_features(seed)
    for _, masks, (slow, soft) in run_both(tmp_path, features):
        same = [np.mean(ours == theirs) for ours, theirs in zip(masks[1:], slow, strict=True)]
        assert min(same) > 0.98
        dataset = Davis(tmp_path)
        sequence = dataset.sequence(dataset.names[0])
        imgs = torch.cat([load(frame) for frame in sequence.frames])
        maps = features(imgs)
        propagation = LabelPropagation(maps[0], cell_labels(masks[0], (16, 16)), OPTIONS)
        for frame, expected in zip(maps[1:], soft, strict=True):
            labels = propagation.step(frame)
            torch.testing.assert_close(labels.sum(0), torch.ones(16, 16))
            off = (labels - expected).abs().amax(0)
            assert float((off < 1e-4).float().mean()) > 0.98


def load(path, size=128):
    from lift_fast.images import to_tensor

    return to_tensor(reader_frame(path, size), MEAN, STD)


def reader_frame(path, size):
    return Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("options", [{"queue": 0}, {"queue": 7}, {"topk": 1}, {"radius": 30}, {"temperature": 1.0}])
def test_every_number_of_the_protocol_is_used(tmp_path, options):
    write_davis(tmp_path, 4, sequences=1, frames=10)
    chosen = {"queue": 3, "radius": 2, "topk": 5, "temperature": 0.1, **options}
    options = PropagationOptions(size=64, batch_size=3, **chosen)
    for _, masks, (slow, _) in run_both(tmp_path, patch_features(4, dtype=torch.float64), options):
        for ours, theirs in zip(masks[1:], slow, strict=True):
            assert np.array_equal(ours, theirs)


def test_perfect_features_propagate_perfectly(tmp_path):
    # Objects on whole cells of 8 pixels, and features that tell their colours apart and nothing else.
    masks = np.zeros((8, 64, 64), dtype=np.uint8)
    for t in range(8):
        masks[t, 8:24, 8 * (t % 5) : 8 * (t % 5) + 16] = 1
        masks[t, 40:56, 40 - 8 * (t % 4) : 56 - 8 * (t % 4)] = 2
        # The second object is hidden for a while and comes back.
        if t in (3, 4):
            masks[t, 40:56] = 0
    colours = np.array([(0, 0, 0), (250, 0, 0), (0, 250, 0)], dtype=np.uint8)
    write_sequence(tmp_path, "cells", colours[masks], masks)
    write_list(tmp_path, ["cells"])

    def features(imgs):
        pixels = imgs * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        means = torch.nn.functional.avg_pool2d(pixels, 8)
        number = torch.where(means[:, 0] > 0.5, 1, torch.where(means[:, 1] > 0.5, 2, 0))
        return torch.nn.functional.one_hot(number, 3).permute(0, 3, 1, 2).float()

    options = PropagationOptions(size=64, radius=None, topk=5)
    sequence = Davis(tmp_path).sequence("cells")
    found = masks_of(sequence, masks[0], features, options)
    out = tmp_path / "out/cells"
    out.mkdir(parents=True)
    for frame, mask in zip(sequence.frames, found, strict=True):
        write_mask(out / f"{frame.stem}.png", mask, PALETTE)
    scores = score_sequence(sequence, out)
    # Bilinear enlargement leaves straight edges where they are. From each corner it takes the six pixels at which the
    # product of two weights 9/16, 11/16, 13/16, 15/16 is below one half, not where the object touches the border.
    whole, at_border = 1 - 24 / 256, 1 - 12 / 256
    assert scores.j[0].tolist() == [whole, whole, whole, whole, at_border, whole]
    # Neither has pixels where the object is hidden.
    assert scores.j[1].tolist() == [whole, whole, 1, 1, whole, whole]
    assert all(one["F-Recall"] == one["J-Recall"] == 1 for one in scores.objects())


def test_the_queue_alone_stays_in_memory():
    options = PropagationOptions(size=32, queue=2, radius=1)
    maps = torch.randn(9, 5, 4, 4)
    labels = torch.rand(2, 4, 4)
    propagation = LabelPropagation(maps[0], labels, options)
    for frame in maps[1:]:
        propagation.step(frame)
    held = [propagation._first, *propagation._queue]
    assert len(held) == 3
    assert all(rows.untyped_storage().nbytes() == rows.numel() * 4 for rows, _ in held)
    with pytest.raises(ValueError, match=r"grid of \(4, 4\), got \[5, 4, 3\]"):
        propagation.step(maps[0, :, :, :3])


def test_channels_are_normalized_one_by_one():
    labels = torch.zeros(4, 2, 3)
    labels[0] = torch.tensor([[0.5, 0.6, 0.7], [0.7, 0.9, 0.5]])
    labels[2] = 0.25
    labels[3] = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]])
    scaled = normalize_channels(labels)
    torch.testing.assert_close(scaled[0], (labels[0] - 0.5) / 0.4)
    assert torch.equal(scaled[1], labels[1])
    assert bool(scaled[2].isposinf().all())
    assert torch.equal(scaled[3], labels[3])
    # Weak evidence counts as much as strong: 0.02 of an object wins where the background is at its least.
    soft = torch.stack([torch.tensor([[0.98, 1.0]]), torch.tensor([[0.02, 0.0]])])
    assert np.array_equal(hard_mask(soft, (1, 2)), [[1, 0]])


def test_first_mask_on_the_grid_takes_the_nearest_pixel():
    mask = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9) % 4
    labels = cell_labels(mask, (2, 3))
    assert labels.shape == (4, 2, 3)
    assert torch.equal(labels.argmax(0), torch.tensor([[mask[1, 1], mask[1, 4], mask[1, 7]], list(mask[4, [1, 4, 7]])]))
    # An object that falls between the cells keeps its channel.
    mask = np.zeros((8, 8), np.uint8)
    mask[0, 0] = 3
    assert cell_labels(mask, (2, 2)).shape == (4, 2, 2)


def test_written_masks_keep_the_palette_of_the_data_set(tmp_path):
    dataset = Davis(write_davis(tmp_path))
    assert dataset.palette == PALETTE
    mask = np.array([[0, 1, 2], [3, 0, 200]], dtype=np.uint8)
    write_mask(tmp_path / "mask.png", mask, dataset.palette)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        assert image.getpalette() == PALETTE
        assert np.array_equal(np.asarray(image), mask)
    # PASCAL VOC's first colours.
    assert usual_palette()[:15] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]
    assert len(usual_palette()) == 768


def test_void_is_background(tmp_path):
    write_davis(tmp_path, sequences=1)
    sequence = Davis(tmp_path).sequence("shape-0")
    path = sequence.annotation(sequence.frames[2])
    mask = np.asarray(Image.open(path)).copy()
    mask[:5] = 255
    save_mask(path, mask)
    out = tmp_path / "out"
    out.mkdir()
    for frame in sequence.frames:
        found = np.asarray(Image.open(sequence.annotation(frame))).copy()
        found[found == 255] = 0
        write_mask(out / f"{frame.stem}.png", found, PALETTE)
    assert float(score_sequence(sequence, out).j.min()) == 1


def test_a_grid_that_leaves_a_border_lies_where_its_cells_are():
    # 8 x 8 cells of 4 pixels from pixel 3 on: what a backbone with overlapping patches covers of 40 pixels.
    mask = np.zeros((80, 120), np.uint8)
    y, x = (np.arange(80) + 0.5) / 2, (np.arange(120) + 0.5) / 3
    cell = np.stack(np.broadcast_arrays((y[:, None] - 3) // 4, (x[None] - 3) // 4))
    mask[(cell[0] == 2) & (cell[1] == 5)] = 1
    mask[(cell[0] <= 0) & (cell[1] >= 7)] = 2
    labels = cell_labels(mask, (8, 8), frame=(40, 40), covered=(3, 3, 32, 32))
    expected = torch.zeros(8, 8, dtype=torch.int64)
    expected[2, 5], expected[0, 7] = 1, 2
    assert torch.equal(labels.argmax(0), expected)
    back = hard_mask(enlarge_covered(labels, (40, 40), (3, 3, 32, 32)), (80, 120))
    # Cells reach to the border; single cells lose their corners to the enlargement.
    assert back[0, 119] == 2
    for number in (1, 2):
        assert np.mean(mask[back == number] == number) == 1
        assert np.sum(back == number) > 0.5 * np.sum(mask == number)


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"queue": -1}, {"radius": -1}, {"topk": 0}, {"batch_size": 2.0}, {"temperature": math.nan}]
)
def test_impossible_options_are_named(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} must be an? .*, got"):
        PropagationOptions(**options)
