"""Runs over DAVIS 2017: interrupted and resumed, with sequences that cannot be used, and from the command line."""

import json
import re

import numpy as np
import pytest
from evaluation_data import (
    OPTIONS,
    masks_of,
    network_of,
    patch_features,
    save_mask,
    write_davis,
)
from PIL import Image

from lift_fast.evaluation.davis import (
    Davis,
    DavisError,
    Job,
    predict_dataset,
    score_folder,
    score_sequence,
)
from lift_fast.evaluation.davis import dataset as reader

pytestmark = pytest.mark.usefixtures("one_thread")


def run(dataset, folder, seen=None, features=None, record=None, **options):
    """Predictions with a small network; ``seen`` collects the number of each batch of frames."""
    network = patch_features(0)

    def counted(imgs):
        if seen is not None:
            seen.append(len(imgs))
        return network(imgs)

    used = network_of(features or counted)
    job = Job("patches", used.methods[0], folder, record or {"features": "patches"})
    return predict_dataset(dataset, [job], used, OPTIONS, **options)


def test_a_run_goes_on_where_it_stopped(tmp_path):
    dataset = Davis(write_davis(tmp_path / "davis", sequences=3))
    folder, whole = tmp_path / "some/out", tmp_path / "whole"
    run(dataset, whole)
    network, left = patch_features(0), 4

    def interrupted(imgs):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return network(imgs)

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
    colour_mask: r"00000\.png is an image of mode RGB; expected an indexed PNG",
    other_size: r"00000\.jpg has 96 x 60 pixels, the mask of the first frame 96 x 61",
    broken_frame: r"00003\.jpg cannot be read as an image",
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
    assert "3 of 3 exist already" in said.err
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
        (["--root", root, *masks, "--masks", file], "note.txt is a file; expected a folder"),
        (["--root", root, *masks, "--masks", file / "deeper/still"], "note.txt is a file; expected a folder"),
    ):
        assert command(*arguments) == 2
        assert message in capsys.readouterr().err
    assert command("--root", root, *masks, "--predict-only", "--quiet") == 0
    assert command("--root", root, *masks, "--predict-only", "--topk", "3", "--quiet") == 2
    assert "made with other settings (topk); choose another folder (--masks DIR)" in capsys.readouterr().err
    assert command("--root", root, *masks, "--predict-only", "--topk", "3", "--quiet", "--overwrite") == 0
