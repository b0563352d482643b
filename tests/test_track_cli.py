"""``lift-fast track``: results, resuming, unusable frames, and what it says when something is wrong."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from moving import pasted
from PIL import Image

from lift_fast.cli import main, track_results
from lift_fast.locks import reserved
from lift_fast.tracking import Tracker, read_objects, track, write_mask

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--size", "64", "--quiet"]
PALETTE = [(5 * i + 80 * channel) % 256 for i in range(256) for channel in range(3)]
FRAMES = 9


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A folder of frames with spaces in its names, which 10 follows 9, and a mask with a palette of its own."""
    folder = tmp_path_factory.mktemp("a video")
    images, masks = pasted(FRAMES, (60, 80), objects=2)
    (folder / "frames").mkdir()
    for number, image in enumerate(images):
        image.save(folder / "frames" / f"no {number + 3}.png")
    write_mask(folder / "first mask.png", masks[0], PALETTE)
    (folder / "points.csv").write_text("id,x,y\nleft,20,20\nright,60.5,40\n")
    return folder


@pytest.fixture
def both(video):
    return [video / "frames", "--mask", video / "first mask.png", "--points", video / "points.csv", *SMALL]


def content(folder):
    """All files but the record, and the record without what differs from run to run."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "track.json"
    }
    return found, json.loads((folder / "track.json").read_text())


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        run("track", "--help")
    assert not stop.value.code
    assert "examples: lift-fast track frames/ --mask first.png" in " ".join(capsys.readouterr().out.split())


def test_results(video, both, tmp_path, capsys):
    out = tmp_path / "the results"
    assert run("track", *both, "--out", out, "--movie", out / "film.gif", "--json") == 0
    said = capsys.readouterr()
    assert said.err == ""
    figures = json.loads(said.out)
    assert (figures["frames"], figures["written"], figures["kept"], figures["failed"]) == (FRAMES, FRAMES, 0, [])
    assert figures["objects"]["2"] == {"frames": FRAMES, "last": FRAMES - 1}
    assert set(figures["points"]) == {"left", "right"}
    names = [f"no {number}" for number in range(3, 3 + FRAMES)]
    assert {path.name for path in (out / "masks").iterdir()} == {f"{name}.png" for name in names}
    assert {path.name for path in (out / "overlay").iterdir()} == {f"{name}.jpg" for name in names}
    assert sorted(path.name for path in out.iterdir()) == ["film.gif", "masks", "overlay", "points.csv", "track.json"]
    with Image.open(out / "film.gif") as film:
        assert film.n_frames == FRAMES
    with (out / "points.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows[::2]] == names
    mask = video / "first mask.png"
    wanted = track(video / "frames", mask, [[20, 20], [60.5, 40]], size=64)
    for number, (name, one) in enumerate(zip(names, wanted, strict=True)):
        found = read_objects(out / "masks" / f"{name}.png")
        assert np.array_equal(found.numbers, one.mask)
        assert found.palette == PALETTE
        left, right = rows[2 * number : 2 * number + 2]
        assert (left["id"], right["id"], left["frame"]) == ("left", "right", str(number))
        assert np.allclose([[float(row["x"]), float(row["y"])] for row in (left, right)], one.points.xy, atol=0.006)
        assert [row["visible"] == "1" for row in (left, right)] == one.points.visible.tolist()


def test_points_on_the_command_line_without_overlay(video, tmp_path):
    out = tmp_path / "out"
    assert run("track", video / "frames", "--points", "20,20", "3.5,7", *SMALL, "--overlay", "none", "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["points.csv", "track.json"]
    rows = (out / "points.csv").read_text().splitlines()
    assert rows[:3] == [
        "frame,name,id,x,y,confidence,visible",
        "0,no 3,0,20.00,20.00,1.0000,1",
        "0,no 3,1,3.50,7.00,1.0000,1",
    ]
    assert len(rows) == 1 + 2 * FRAMES


class Stop(Exception):
    pass


@pytest.mark.parametrize("seconds", [0.0, 1e9])
@pytest.mark.parametrize("after", [1, 2, FRAMES - 1])
def test_a_stopped_run_resumes_with_the_same_results(both, tmp_path, monkeypatch, capsys, after, seconds):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run("track", *both, "--queue", "3", "--out", whole) == 0
    monkeypatch.setattr(track_results, "_SECONDS", seconds)
    step = Tracker.step

    def stopping(self, image):
        if self.index + 1 == after:
            raise Stop
        return step(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "step", stopping)
        with pytest.raises(Stop):
            run("track", *both, "--queue", "3", "--out", out)
    assert (out / "track_state.pth").exists() == (seconds == 0 and after > 1)
    # What was written after the last state.
    with (out / "points.csv").open("a") as file:
        file.write("9,half of a l")
    capsys.readouterr()
    assert run("track", *both, "--queue", "3", "--out", out, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["kept"] == (after if seconds == 0 and after > 1 else 0)
    assert figures["frames"] == FRAMES
    assert content(out) == content(whole)


def test_a_killed_run_resumes(both, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run("track", *both, "--out", whole) == 0
    code = (
        "import sys, time\n"
        "from lift_fast.cli import main, track_results\n"
        "from lift_fast.tracking import Tracker\n"
        "track_results._SECONDS = 0\n"
        "step = Tracker.step\n"
        "Tracker.step = lambda self, image: (time.sleep(0.3), step(self, image))[1]\n"
        "sys.argv[0] = 'lift-fast'\n"
        "sys.exit(main())\n"
    )
    for number in (signal.SIGKILL, signal.SIGINT):
        words = [sys.executable, "-c", code, "track", *map(str, both), "--out", str(out)]
        process = subprocess.Popen(words, stderr=subprocess.PIPE)
        written = len(list((out / "masks").glob("*.png"))) if out.exists() else 0
        deadline = time.monotonic() + 120
        while len(list((out / "masks").glob("*.png"))) < written + 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        assert b"Traceback" not in said
    assert run("track", *both, "--out", out) == 0
    assert content(out) == content(whole)


def test_a_complete_run_is_kept(both, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("track", *both, "--out", out) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert run("track", *both, "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kept"] == FRAMES
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    (out / "masks" / "no 5.png").unlink()
    assert run("track", *both, "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["written"] == FRAMES


def test_other_settings_are_refused_or_overwrite(video, both, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("track", *both, "--out", out) == 0
    files = content(out)
    (out / "masks" / "notes.txt").write_text("mine")
    write_mask(tmp_path / "other.png", np.ones((60, 80), dtype=np.uint8), PALETTE)
    for more, name in (
        (["--radius", "3"], "radius"),
        (["--no-lift"], "lift"),
        (["--points", "1,2"], "points"),
        (["--mask", tmp_path / "other.png"], "mask"),
        (["--overlay", "png"], "overlay"),
    ):
        assert run("track", *both, *more, "--out", out) == 2
        assert f"made with other settings ({name})" in capsys.readouterr().err
    assert content(out)[0] == {**files[0], "masks/notes.txt": b"mine"}
    assert run("track", *both, "--overlay", "png", "--radius", "none", "--overwrite", "--out", out) == 0
    assert {path.suffix for path in (out / "overlay").iterdir()} == {".png"}
    assert (out / "masks" / "notes.txt").read_text() == "mine"


def test_starting_over_leaves_files_of_other_names(video, both, tmp_path, monkeypatch):
    Image.open(video / "frames" / "no 3.png").save(tmp_path / "clip.gif", save_all=True, append_images=[])
    clip = [tmp_path / "clip.gif", "--points", "1,1", *SMALL]
    out = tmp_path / "out"

    def interrupted(_):
        raise KeyboardInterrupt

    for number, command in enumerate((both, clip, both)):
        # The second run starts over after one that was stopped before it wrote a state.
        with monkeypatch.context() as patch:
            if number == 0:
                patch.setattr(track_results.Results, "finish", interrupted)
            assert run("track", *command, "--overwrite", "--out", out) == (130 if number == 0 else 0)
        mine = [out / "overlay" / "holiday.jpg", out / "overlay" / "no 3 better.png", out / "points.txt"]
        if number == 0:
            mine.append(out / "masks" / "mine.png")
            for path in mine:
                path.write_text("mine")
        assert all(path.read_text() == "mine" for path in mine)
        names = {path.stem for path in (out / "overlay").iterdir()} - {"holiday", "no 3 better"}
        assert names == ({"000000"} if command is clip else {f"no {frame + 3}" for frame in range(FRAMES)})


@pytest.mark.parametrize("more", [["--points", "99,1"], ["--weights", "none.pth"], ["--temperature", "-1"]])
def test_a_wrong_command_line_overwrites_nothing(both, tmp_path, more, capsys):
    out = tmp_path / "out"
    assert run("track", *both, "--out", out) == 0
    before = content(out)
    assert run("track", *both, "--out", out, "--overwrite", *more) == 2
    assert content(out) == before


def test_frames_that_cannot_be_used_are_left_out(video, tmp_path, capsys):
    frames, out, without = tmp_path / "frames", tmp_path / "out", tmp_path / "without"
    frames.mkdir()
    without.mkdir()
    for number, path in enumerate(sorted((video / "frames").iterdir(), key=lambda path: int(path.stem[3:]))):
        if number not in (2, 4):
            (without / path.name).write_bytes(path.read_bytes())
        (frames / path.name).write_bytes(path.read_bytes() if number != 2 else path.read_bytes()[:200])
        if number == 4:
            Image.new("RGB", (9, 9)).save(frames / path.name)
    more = ["--mask", video / "first mask.png", "--points", "20,20", *SMALL]
    assert run("track", frames, *more, "--out", out) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "left out: " in said[0]
    assert "no 5.png cannot be read as an image" in said[0]
    assert "no 7: it has 9 x 9 pixels, the first frame 80 x 60" in said[1]
    # Also when it is complete.
    assert run("track", frames, *more, "--out", out) == 1
    assert run("track", without, *more, "--out", tmp_path / "kept") == 0
    for path in (tmp_path / "kept").rglob("*.png"):
        assert path.read_bytes() == (out / path.relative_to(tmp_path / "kept")).read_bytes()
    assert not (out / "masks" / "no 5.png").exists()


def test_the_first_frame_must_be_readable(video, tmp_path, capsys):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "1.png").write_text("")
    assert run("track", tmp_path / "frames", "--points", "1,2", *SMALL, "--out", tmp_path / "out") == 2
    assert "1.png cannot be read as an image" in capsys.readouterr().err


def test_one_frame_next_to_its_mask(tmp_path):
    images, masks = pasted(1, (40, 56))
    images[0].save(tmp_path / "frame.png")
    write_mask(tmp_path / "frame mask.png", masks[0], PALETTE)
    assert run("track", tmp_path, "--mask", tmp_path / "frame mask.png", *SMALL, "--out", tmp_path / "out") == 0
    assert [path.name for path in (tmp_path / "out" / "masks").iterdir()] == ["frame.png"]
    assert np.array_equal(read_objects(tmp_path / "out" / "masks" / "frame.png").numbers, masks[0])


def test_video_file(video, tmp_path):
    pytest.importorskip("av")
    film = tmp_path / "film.mp4"
    more = ["--mask", video / "first mask.png", *SMALL]
    assert run("track", video / "frames", *more, "--out", tmp_path / "a", "--movie", film, "--fps", "10") == 0
    assert run("track", film, *more, "--out", tmp_path / "b") == 0
    assert len(list((tmp_path / "b" / "masks").iterdir())) == FRAMES


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "nothing to follow"),
        (["--binary", "--points", "1,2"], "--binary is about the mask"),
        (["--points", "1,2", "x"], "--points takes X,Y ... or one CSV or JSON file, got 'x'"),
        (["--points", "none.csv"], "no file of points at none.csv"),
        (["--points", "80,2"], "points must lie in the first frame, 80 x 60 pixels"),
        (["--points", "1,2", "--movie", "film.avi"], "--movie must end in .mp4, .webp, .gif"),
        (["--points", "1,2", "--movie", "film.gif", "--overlay", "none"], "leave out --overlay none"),
        (["--points", "1,2", "--movie", "no folder/film.gif"], "does not exist"),
        (["--points", "1,2", "--movie", "{folder}/frames/film.gif"], "would lie among the frames"),
        (["--points", "1,2", "--temperature", "0"], "temperature must be a positive number"),
        (["--points", "1,2", "--iterations", "2", "--no-lift"], "--iterations repeats LiFT"),
        (["--mask", "none.png"], "no mask at none.png"),
    ],
)
def test_usage_errors(video, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    more = [word.replace("{folder}", str(video)) for word in more]
    assert run("track", video / "frames", *more, *SMALL) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_slowest_film(video, tmp_path, capsys):
    given = ["--points", "1,1", *SMALL, "--out", tmp_path / "out", "--movie", tmp_path / "film.gif", "--fps"]
    assert run("track", video / "frames", *given, "0.01") == 0
    with Image.open(tmp_path / "film.gif") as film:
        assert film.info["duration"] == 100_000
    with pytest.raises(SystemExit):
        run("track", video / "frames", *given, "0.001")
    assert "expected frames per second, 0.01 to 1000, got '0.001'" in capsys.readouterr().err


def test_what_lies_in_the_way(video, both, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "masks").mkdir(parents=True)
    write_mask(out / "masks" / "mine.png", np.ones((60, 80), dtype=np.uint8), PALETTE)
    for more in ([], ["--overwrite"]):
        assert run("track", *both, *more, "--out", out) == 2
        assert "no track.json of lift-fast track" in capsys.readouterr().err
    assert run("track", video / "frames", "--mask", out / "masks" / "mine.png", *SMALL, "--out", out) == 2
    assert "lies where results of --out" in capsys.readouterr().err
    assert run("track", out / "masks", "--points", "1,1", *SMALL, "--out", out) == 2
    assert "lies where results of --out" in capsys.readouterr().err
    (out / "masks" / "mine.png").unlink()
    (out / "track.json").write_text("{}")
    assert run("track", *both, "--out", out, "--overwrite") == 2
    assert "was not written by lift-fast track" in capsys.readouterr().err
    (out / "track.json").unlink()
    with reserved(out, "tracking"):
        assert run("track", *both, "--out", out) == 2
    assert "another tracking" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run("track", *both, "--out", tmp_path / "file") == 2
    assert "is a file; expected a folder" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "shorter", "other"])
def test_a_damaged_state_is_named(both, tmp_path, monkeypatch, capsys, damage):
    out = tmp_path / "out"
    monkeypatch.setattr(track_results, "_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(track_results.Results, "finish", lambda self: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            run("track", *both, "--out", out)
    state = out / "track_state.pth"
    if damage == "cut":
        state.write_bytes(state.read_bytes()[:500])
    elif damage == "shorter":
        (out / "points.csv").write_text("frame\n")
    else:
        import torch

        torch.save({"settings": "[]"}, state)
    assert run("track", *both, "--out", out) == 2
    said = capsys.readouterr().err
    assert "--overwrite" in said
    assert "cannot be resumed" in said
    assert run("track", *both, "--out", out, "--overwrite") == 0


def test_a_full_disk_is_reported(both, tmp_path, monkeypatch, capsys):
    write = track_results.write_mask

    def full(path, *rest):
        if path.name == "no 6.png":
            raise OSError(28, os.strerror(28))
        write(path, *rest)

    monkeypatch.setattr(track_results, "_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(track_results, "write_mask", full)
        assert run("track", *both, "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "the frames written so far are kept" in said
    assert run("track", *both, "--out", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 3
