"""DAVIS 2017 on generated data sets in the original layout, against the protocol written down step by step."""

import json
import math
import re

import numpy as np
import pytest
import torch
from evaluation_data import PALETTE, save_mask, write_davis, write_list, write_sequence
from PIL import Image

from lift_fast.evaluation.davis import (
    Davis,
    DavisError,
    Job,
    LabelPropagation,
    Network,
    PropagationOptions,
    predict,
    predict_dataset,
    score_folder,
    score_sequence,
)
from lift_fast.evaluation.davis import dataset as reader
from lift_fast.evaluation.davis.protocol import cell_labels, enlarge_covered, hard_mask, normalize_channels
from lift_fast.evaluation.methods import Features

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)

pytestmark = pytest.mark.usefixtures("one_thread")


def patch_features(seed, patch=8, channels=24, dtype=torch.float32):
    """A small stand-in for a backbone: each patch through one random layer. [B, 3, S, S] -> [B, C, S/8, S/8]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, 3, patch, patch, generator=generator) / patch

    def features(pictures):
        return torch.nn.functional.conv2d(pictures, weight, stride=patch).tanh().to(dtype)

    return features


def network_of(*features):
    """Functions of pictures as the methods of a run."""

    def method(function):
        def compute(batch):
            assert batch.imgs.shape[2] == batch.imgs.shape[3]
            return Features(function(batch.imgs), (0, 0, *batch.imgs.shape[2:]))

        return compute

    return Network([method(function) for function in features], MEAN, STD, patch_size=8)


def masks_of(video, mask, features, options):
    return [found for (found,) in predict(video.frames, mask, network_of(features), options)]


# The protocol once more, as its description reads: nothing here comes from the package.


def slow_frame(path, size):
    picture = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    pixels = (np.asarray(picture, dtype=np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
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


OPTIONS = PropagationOptions(size=128, queue=3, radius=4, topk=5, batch_size=4)


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
            reader.write_mask(folder / f"{frame.stem}.png", mask, PALETTE)
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
        pictures = torch.cat([load(frame) for frame in sequence.frames])
        maps = features(pictures)
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

    def features(pictures):
        pixels = pictures * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        means = torch.nn.functional.avg_pool2d(pixels, 8)
        number = torch.where(means[:, 0] > 0.5, 1, torch.where(means[:, 1] > 0.5, 2, 0))
        return torch.nn.functional.one_hot(number, 3).permute(0, 3, 1, 2).float()

    options = PropagationOptions(size=64, radius=None, topk=5)
    sequence = Davis(tmp_path).sequence("cells")
    found = masks_of(sequence, masks[0], features, options)
    out = tmp_path / "out/cells"
    out.mkdir(parents=True)
    for frame, mask in zip(sequence.frames, found, strict=True):
        reader.write_mask(out / f"{frame.stem}.png", mask, PALETTE)
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
    reader.write_mask(tmp_path / "mask.png", mask, dataset.palette)
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == "P"
        assert image.getpalette() == PALETTE
        assert np.array_equal(np.asarray(image), mask)
    # PASCAL VOC's first colours.
    assert reader.usual_palette()[:15] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]
    assert len(reader.usual_palette()) == 768


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
        reader.write_mask(out / f"{frame.stem}.png", found, PALETTE)
    assert float(score_sequence(sequence, out).j.min()) == 1


def run(dataset, folder, seen=None, features=None, record=None, **options):
    """Predictions with a small network; ``seen`` collects the number of each batch of frames."""
    network = patch_features(0)

    def counted(pictures):
        if seen is not None:
            seen.append(len(pictures))
        return network(pictures)

    used = network_of(features or counted)
    job = Job("patches", used.methods[0], folder, record or {"features": "patches"})
    return predict_dataset(dataset, [job], used, OPTIONS, **options)


def test_a_run_goes_on_where_it_stopped(tmp_path):
    dataset = Davis(write_davis(tmp_path / "davis", sequences=3))
    folder, whole = tmp_path / "some/out", tmp_path / "whole"
    run(dataset, whole)
    network, left = patch_features(0), 4

    def interrupted(pictures):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return network(pictures)

    # Two batches of frames for each sequence: stopped in the middle of the second.
    with pytest.raises(KeyboardInterrupt):
        run(dataset, folder, features=interrupted)
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.json", "shape-0"]
    seen, progress = [], []
    done = run(dataset, folder, seen, progress=progress.append)
    assert done.kept == [("shape-0", "patches")]
    assert done.computed == [("shape-1", "patches"), ("shape-2", "patches")]
    assert not done.problems
    assert progress == [6, *[1] * 6, 0, *[1] * 6, 0]
    assert (seen, done.frames) == ([4, 2, 4, 2], 12)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*"))
    assert files == sorted(path.relative_to(folder) for path in folder.rglob("*"))
    for path in files:
        if path.suffix:
            assert (whole / path).read_bytes() == (folder / path).read_bytes()
    # A mask that went missing is computed again.
    (folder / "shape-1/00003.png").unlink()
    assert run(dataset, folder).computed == [("shape-1", "patches")]
    assert (folder / "shape-1/00003.png").read_bytes() == (whole / "shape-1/00003.png").read_bytes()


def test_several_methods_in_one_run_are_those_of_single_runs(tmp_path):
    dataset = Davis(write_davis(tmp_path / "davis", 3))
    # Of different grids and channels.
    networks = {"fine": patch_features(1), "coarse": patch_features(2, patch=16, channels=9)}
    used = network_of(*networks.values())
    jobs = [Job(name, f, tmp_path / "both" / name, {}) for name, f in zip(networks, used.methods, strict=True)]
    # One of them has been computed before.
    run(dataset, tmp_path / "both/fine", features=networks["fine"], record={"x": 1}, names=["shape-0"])
    (tmp_path / "both/fine/predictions.json").write_text("{}")
    done = predict_dataset(dataset, jobs, used, OPTIONS)
    assert done.kept == [("shape-0", "fine")]
    assert done.computed == [("shape-0", "coarse"), ("shape-1", "fine"), ("shape-1", "coarse")]
    for name, features in networks.items():
        run(dataset, tmp_path / name, features=features)
        for path in (tmp_path / name).rglob("*.png"):
            assert path.read_bytes() == (tmp_path / "both" / name / path.relative_to(tmp_path / name)).read_bytes()


def test_masks_of_other_settings_are_not_mixed(tmp_path):
    dataset = Davis(write_davis(tmp_path / "davis"))
    folder = tmp_path / "out"
    run(dataset, folder, record={"size": 128, "features": "a"})
    with pytest.raises(DavisError, match=r"out was made with other settings \(features\)"):
        run(dataset, folder, record={"size": 128, "features": "b"})
    done = run(dataset, folder, names=["shape-1"], record={"size": 128, "features": "b"}, overwrite=True)
    assert done.computed == [("shape-1", "patches")]
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.json", "shape-1"]
    done = run(dataset, folder, record={"size": 128, "features": "b"}, overwrite=True)
    assert len(done.computed) == 2
    (folder / "predictions.json").write_text("{")
    with pytest.raises(DavisError, match=r"predictions\.json cannot be read"):
        run(dataset, folder)


def test_the_data_set_itself_is_never_overwritten(tmp_path):
    dataset = Davis(write_davis(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with pytest.raises(DavisError, match=r"480p holds shape-0, but no predictions\.json"):
        run(dataset, dataset.annotations_folder, overwrite=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_a_bad_sequence_does_not_stop_a_run(tmp_path):
    dataset = Davis(write_davis(tmp_path / "davis", sequences=3))
    broken_frame(tmp_path / "davis/JPEGImages/480p/shape-1", None)
    done = run(dataset, tmp_path / "out")
    assert [name for name, _ in done.computed] == ["shape-0", "shape-2"]
    assert list(done.problems) == ["shape-1"]
    assert "shape-1/00003.jpg cannot be read" in done.problems["shape-1"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.json", "shape-0", "shape-2"]


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


def damage_list(root):
    (root / "ImageSets/2017/val.txt").write_text("\n\n")


def damage_names(root):
    (root / "ImageSets/2017/val.txt").write_text("shape-0\n../elsewhere\n")


def damage_layout(root):
    (root / "JPEGImages/480p").rename(root / "JPEGImages/1080p")


def damage_missing_list(root):
    (root / "ImageSets/2017/val.txt").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_list, r"val\.txt lists no sequence"),
        (damage_names, r"val\.txt: expected the name of a folder in each line, got '\.\./elsewhere'"),
        (damage_layout, r"no folder .*JPEGImages.480p"),
        (damage_missing_list, r"no list of sequences at .*val\.txt"),
    ],
)
def test_a_broken_data_set_is_refused(tmp_path, damage, message):
    damage(write_davis(tmp_path))
    with pytest.raises(DavisError, match=message):
        Davis(tmp_path)


def no_frames(frames, masks):
    for path in frames.iterdir():
        path.unlink()


def no_first_mask(frames, masks):
    (masks / "00000.png").unlink()


def no_object(frames, masks):
    save_mask(masks / "00000.png", np.full((60, 96), 255, np.uint8))


def colour_mask(frames, masks):
    Image.new("RGB", (96, 60)).save(masks / "00000.png")


def other_size(frames, masks):
    save_mask(masks / "00000.png", np.ones((61, 96), np.uint8))


def broken_frame(frames, masks):
    data = (frames / "00003.jpg").read_bytes()
    (frames / "00003.jpg").write_bytes(data[: len(data) // 2])


def broken_mask(frames, masks):
    (masks / "00000.png").write_bytes(b"\x89PNG and nothing more")


BAD_SEQUENCES = {
    no_frames: r"shape-0: no \*\.jpg in .*JPEGImages.480p.shape-0",
    no_first_mask: r"no mask at .*Annotations.480p.shape-0.00000\.png",
    no_object: r"00000\.png holds no object",
    colour_mask: r"00000\.png is a picture of mode RGB; expected an indexed PNG",
    other_size: r"00000\.jpg has 96 x 60 pixels, the mask of the first frame 96 x 61",
    broken_frame: r"00003\.jpg cannot be read as a picture",
    broken_mask: r"00000\.png cannot be read as a mask",
}


@pytest.mark.parametrize("damage", BAD_SEQUENCES, ids=lambda damage: damage.__name__)
def test_what_is_wrong_with_a_sequence_is_named(tmp_path, damage):
    write_davis(tmp_path, sequences=1)
    damage(tmp_path / "JPEGImages/480p/shape-0", tmp_path / "Annotations/480p/shape-0")

    def everything():
        sequence = Davis(tmp_path).sequence("shape-0")
        return masks_of(sequence, reader.first_annotation(sequence), patch_features(0), OPTIONS)

    with pytest.raises(DavisError, match=BAD_SEQUENCES[damage]):
        everything()


def test_what_cannot_be_scored_is_named_and_left_out(tmp_path):
    names = [f"shape-{i}" for i in range(6)]
    dataset = Davis(write_davis(tmp_path, sequences=6))
    out = tmp_path / "out"
    for name in names:
        (out / name).mkdir(parents=True)
        for path in dataset.sequence(name).annotations.iterdir():
            (out / name / path.name).write_bytes(path.read_bytes())
    (out / names[1] / "00002.png").unlink()
    save_mask(out / names[2] / "00002.png", np.zeros((60, 95), np.uint8))
    save_mask(out / names[3] / "00002.png", np.full((60, 96), 7, np.uint8))
    (out / names[4] / "00002.png").write_bytes(b"nothing")
    (dataset.sequence(names[5]).annotations / "00002.png").unlink()
    # Neither the first nor the last frame is looked at.
    (out / names[0] / "00000.png").unlink()
    (out / names[0] / "00005.png").unlink()
    seen = []
    scores, problems = score_folder(dataset, out, progress=seen.append)
    assert sum(seen) == len(names)
    assert [one.name for one in scores] == names[:1]
    assert scores[0].frames == ("00001", "00002", "00003", "00004")
    assert scores[0].j.shape == (1, 4)
    assert float(scores[0].j.min()) == float(scores[0].f.min()) == 1
    texts = (
        r"no mask at .*out/shape-1/00002\.png",
        r"out/shape-2/00002\.png has 95 x 60 pixels, the annotation 96 x 60",
        r"out/shape-3/00002\.png holds object 7, but shape-3 has objects 1 to 1",
        r"out/shape-4/00002\.png cannot be read as a mask",
        r"no mask at .*Annotations/480p/shape-5/00002\.png",
    )
    assert list(problems) == names[1:]
    for problem, text in zip(problems.values(), texts, strict=True):
        assert re.search(text, problem)


def test_too_few_frames_to_score(tmp_path):
    dataset = Davis(write_davis(tmp_path, sequences=1, frames=2))
    with pytest.raises(DavisError, match="shape-0 has 2 frames"):
        score_sequence(dataset.sequence("shape-0"), tmp_path)


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"queue": -1}, {"radius": -1}, {"topk": 0}, {"batch_size": 2.0}, {"temperature": math.nan}]
)
def test_impossible_options_are_named(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} must be an? .*, got"):
        PropagationOptions(**options)


TINY = ["--model", "vit_tiny_patch16_224", "--random-weights", "--random-lift", "--size", "64", "--threads", "1"]


def command(*arguments):
    from lift_fast.cli import main

    return main(["eval", "davis", *map(str, arguments)])


def test_command_predicts_and_scores(tmp_path, capsys):
    root = write_davis(tmp_path / "davis", sequences=2)
    broken_frame(root / "JPEGImages/480p/shape-1", None)
    options = ["--root", root, "--masks", tmp_path / "masks", *TINY, "--method", "bilinear", "lift", "stride-8"]
    outputs = ["--out", tmp_path / "r.json", "--table", tmp_path / "r.tex", "--csv", "--quiet"]
    assert command(*options, *outputs) == 1
    said = capsys.readouterr()
    assert "| bilinear |" in said.out
    assert "skipped: shape-1: " in said.err
    assert (tmp_path / "r.tex").read_text().count("&") > 10
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["protocol"], result["complete"], list(result["skipped"])) == ("davis", False, ["shape-1"])
    assert list(result["summary"]) == ["bilinear", "lift", "stride-8"]
    summary, scores = result["summary"]["lift"], result["scores"]["lift"]["shape-0"]
    assert (summary["sequences"], summary["objects"], scores["frames"]) == (1, 1, [f"{t:05d}" for t in range(1, 5)])
    assert summary["J-Mean"] == pytest.approx(100 * np.mean(scores["J"]))
    assert summary["J&F-Mean"] == pytest.approx(50 * (np.mean(scores["J"]) + np.mean(scores["F"])))
    lines = (tmp_path / "masks/lift/global_results-val.csv").read_text().splitlines()
    assert lines[0] == "J&F-Mean,J-Mean,J-Recall,J-Decay,F-Mean,F-Recall,F-Decay"
    assert lines[1].split(",")[1] == f"{np.mean(scores['J']):.3f}"
    lines = (tmp_path / "masks/lift/per-sequence_results-val.csv").read_text().splitlines()
    assert lines == ["Sequence,J-Mean,F-Mean", f"shape-0_1,{np.mean(scores['J']):.3f},{np.mean(scores['F']):.3f}"]

    # The masks alone give the same scores; both steps stand alone.
    folder = tmp_path / "masks/lift"
    assert command("--root", root, "--score", folder, f"again={folder}", "--sequences", "shape-0", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["summary"] == {"lift": summary, "again": summary}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "masks").rglob("*.png")}
    assert command(*options, "--predict-only") == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "3 of 3 were there already" in said.err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "masks").rglob("*.png")}


def test_command_names_what_cannot_be_used(tmp_path, capsys):
    root = write_davis(tmp_path / "davis", sequences=1)
    masks = ["--masks", tmp_path / "masks", "--method", "backbone", *TINY]
    file = tmp_path / "note.txt"
    file.touch()
    for arguments, message in (
        (["--root", tmp_path], "JPEGImages"),
        (["--root", root, "--sequences", "elsewhere"], "val.txt does not list elsewhere"),
        (["--root", root, "--score", tmp_path / "gone"], "gone"),
        (["--root", root, "--score", root, root], "two folders are called 'davis'"),
        (["--root", root, *masks, "--temperature", "0"], "temperature must be a positive number"),
        (["--root", root, *masks, "--size", "15"], "patch"),
        (["--root", root, *masks, "--out", tmp_path / "no/r.json"], "does not exist"),
        (["--root", root, *masks, "--masks", file], "note.txt is a file; give a folder"),
        (["--root", root, *masks, "--masks", file / "deeper/still"], "note.txt is a file; give a folder"),
    ):
        assert command(*arguments) == 2
        assert message in capsys.readouterr().err
    assert command("--root", root, *masks, "--predict-only", "--quiet") == 0
    assert command("--root", root, *masks, "--predict-only", "--topk", "3", "--quiet") == 2
    assert "made with other settings (topk); choose another folder (--masks DIR)" in capsys.readouterr().err
    assert command("--root", root, *masks, "--predict-only", "--topk", "3", "--quiet", "--overwrite") == 0
