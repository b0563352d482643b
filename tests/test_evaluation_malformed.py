"""Malformed annotations: from the command line each gives a line of text, never a traceback, a hang or much memory.

Valid files are spoilt in ways that a seed alone decides. A few per kind run here; ``campaign`` takes any number.
"""

import functools
import io
import json
import random
import struct
import time
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from evaluation_data import make_coco, make_spair, make_voc, sizes_and_boxes, tiny_backbone, voc_object, write_davis
from PIL import Image

from lift_fast.cli import eval_options, main
from lift_fast.evaluation.methods import build_methods

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 40
SECONDS = 5.0
# What a campaign of 500 of each kind found.
FOUND = {"spair-image": (86,), "coco-json": (228, 331), "davis-mask": (119,)}


# How any file can be spoilt.


def cut(pick, data):
    return data[: pick.randrange(len(data) + 1)]


def flip(pick, data):
    out = bytearray(data)
    for _ in range(pick.randint(1, 8)):
        if out:
            out[pick.randrange(len(out))] = pick.randrange(256)
    return bytes(out)


def remove(pick, data):
    start = pick.randrange(len(data) + 1)
    return data[:start] + data[start + pick.randint(1, 40) :]


def insert(pick, data):
    start = pick.randrange(len(data) + 1)
    junk = pick.choice([b"\0", b"\xff\xfe", b"\n" * 50, b"\x1b[2J", b"\xc3", b"9" * 5000, b"../../", b"<!--", b"]]>"])
    return data[:start] + junk + data[start:]


def repeat(pick, data):
    start = pick.randrange(len(data) + 1)
    stop = min(len(data), start + pick.randint(1, 200))
    return data[:stop] + data[start:stop] * pick.choice([1, 2, 500]) + data[stop:]


def other_encoding(pick, data):
    text = data.decode("latin-1")
    return pick.choice(
        [
            text.encode("utf-16"),
            text.encode("utf-32"),
            b"\xef\xbb\xbf" + data,
            data + b"\xe9\xe8",
            text.encode("cp037", "ignore"),
        ]
    )


def replace(pick, _data):
    return pick.choice(
        [b"", b" \n\t", b"\0" * 1000, b"null", b"[]", b"{}", b"\x89PNG\r\n\x1a\n", b"GIF89a", bytes(range(256))]
    )


ANY = (cut, flip, remove, insert, repeat, other_encoding, replace)


# JSON.

STRANGE = (
    None, True, "", "x" * 100_000, "7", "\0", "\ud800", "../../../etc/passwd", 0, -1, 10**400, 1e308, -1e308, 5e-324,
    float("nan"), float("inf"), [], {}, [[]], [None], {"a": {}}, 2**63, [1e308] * 4, "N" * 5000, [[[[1]]]], 0.5,
)  # fmt: skip


def places(value, path=()):
    yield path
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(entry, (*path, key))


def json_value(pick, data):
    content = json.loads(data)
    for _ in range(pick.randint(1, 3)):
        path = pick.choice(list(places(content)))
        if not path:
            return json.dumps(pick.choice(STRANGE)).encode()
        parent = functools.reduce(lambda value, key: value[key], path[:-1], content)
        if pick.random() < 0.3 and isinstance(parent, dict):
            del parent[path[-1]]
        else:
            parent[path[-1]] = pick.choice(STRANGE)
    return json.dumps(content).encode()


def json_depth(pick, data):
    deep = pick.choice([b"[", b'{"a":', b'[{"src_kps":'])
    return pick.choice([deep * 100_000, data.rstrip()[:-1] + b', "kps": ' + deep * 50_000])


def json_digits(pick, data):
    number = pick.choice([b"9" * 10_000, b"-" + b"1" * 5000, b"1e999999", b"0." + b"0" * 5000 + b"1"])
    parts = data.split(b": ")
    if len(parts) == 1:
        return number
    return b": ".join([*parts[:-1], number + b"}"])


JSON = (*ANY, json_value, json_value, json_value, json_depth, json_digits)


# XML.


def laughs(pick, _data):
    lines = [b'<!ENTITY a0 "ha">', *(b'<!ENTITY a%d "%s">' % (i, b"&a%d;" % (i - 1) * 10) for i in range(1, 12))]
    return b"<!DOCTYPE annotation [" + b"".join(lines) + b"]><annotation>&a11;</annotation>"


def outside_entity(_pick, _data):
    return b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation><object>&e;</object></annotation>'


def xml_depth(pick, _data):
    count = pick.choice([1000, 200_000])
    return pick.choice([b"<a>" * count + b"</a>" * count, b"<annotation>" + b"<object>" * count])


def xml_value(pick, data):
    text = data.decode()
    for _ in range(pick.randint(1, 3)):
        start = text.find(">", pick.randrange(len(text))) + 1
        stop = text.find("<", start)
        value = pick.choice(
            ["", "nan", "inf", "1e400", "-1", "9" * 5000, "x", "1.5", " ", "&#0;", "&lt;", "1e308", "१२"]
        )
        if start and stop >= 0:
            text = text[:start] + value + text[stop:]
    return text.encode()


def xml_name(pick, data):
    names = [b"bndbox", b"xmin", b"ymax", b"object", b"annotation", b"difficult"]
    return data.replace(pick.choice(names), pick.choice([*names, b"", b"x" * 10_000, b"a:b"]))


XML = (*ANY, laughs, outside_entity, xml_depth, xml_value, xml_value, xml_name)


# Lists.


def line(pick, data):
    longest = b"COCO_train2014_" + b"9" * 5000 + b".jpg"
    odd = pick.choice(
        [b"..", b".", b"/", b"/etc", b"a/../b", b"\\", b"x" * 300, b"x" * 100_000, b"\xff", b"\0", b"#", "é".encode(),
         b"*", b"~", b"[a", longest, b"COCO_train2014_.jpg", b"1 1 1", "\u2028".encode(), b"0:cat"]
    )  # fmt: skip
    lines = data.split(b"\n")
    lines[pick.randrange(len(lines))] = odd
    return b"\n".join(lines)


def many_lines(pick, data):
    return pick.choice([data * 3000, b"".join(b"n%d\n" % n for n in range(20_000)), b"\n" * 500_000])


LIST = (*ANY, line, line, line, many_lines)


# Masks.


def png(width, height, depth, kind, rows, more=b""):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + more
        + chunk(b"IDAT", zlib.compress(rows, 1))
        + chunk(b"IEND", b"")
    )


def other_header(pick, _data):
    sizes = [
        (0, 0),
        (1, 1),
        (2**31 - 1, 2**31 - 1),
        (2**31, 1),
        (65535, 65535),
        (96, 60),
        (13_000, 13_000),
        (100_000, 1),
    ]
    kind, depth = pick.choice([(0, 1), (0, 8), (0, 16), (2, 8), (3, 1), (3, 8), (4, 8), (6, 8), (7, 3)])
    return png(*pick.choice(sizes), depth, kind, bytes(pick.choice([0, 1, 6000, 100_000])))


@functools.cache
def bomb(kind):
    # As many pixels as Pillow lets pass, in a file of less than a megabyte.
    side, channels = 13_000, {0: 1, 2: 3, 6: 4}[kind]
    return png(side, side, 8, kind, bytes((side * channels + 1) * side))


def large(pick, _data):
    return bomb(pick.choice([0, 2, 6]))


def other_image(pick, _data):
    mode = pick.choice(["RGB", "RGBA", "LA", "L", "1", "I", "I;16", "F", "P", "CMYK"])
    file = io.BytesIO()
    image = Image.new(mode, pick.choice([(96, 60), (60, 96), (1, 1)]))
    image.save(file, "TIFF" if mode in ("I", "F", "CMYK") else pick.choice(["PNG", "TIFF"]))
    return file.getvalue()


def other_numbers(pick, _data):
    numbers = pick.choice([[0], [255], [0, 255], [254], [0, 7], [1]])
    values = np.random.default_rng(pick.randrange(99)).choice(numbers, (60, 96)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


MASK = (cut, flip, flip, remove, insert, repeat, replace, other_header, other_header, other_image, other_numbers)


# What is spoilt, and the command that reads it.


def spair_case(root):
    make_spair(root, 0, pairs=2)
    return ["eval", "spair", "--root", root, "--sizes", "32", "--method", "backbone"]


def davis_case(root):
    write_davis(root, 0, sequences=2, frames=4)
    return ["eval", "davis", "--root", root, "--masks", root / "masks", "--size", "32", "--method", "backbone"]


def scored_case(root):
    write_davis(root, 0, sequences=1, frames=4)
    return ["eval", "davis", "--root", root, "--score", root / "Annotations/480p"]


def voc_case(root):
    make_voc(root, {f"{i}": (size, box, [voc_object(box)] * 2) for i, (size, box) in enumerate(sizes_and_boxes(0, 2))})
    return ["eval", "discovery", "--dataset", "voc07", "--root", root, "--method", "backbone"]


def coco_case(root):
    things = {i: (size, box, [([8, 8, 20, 30], 0)] * 2) for i, (size, box) in enumerate(sizes_and_boxes(0, 2), 1)}
    make_coco(root, things)
    return ["eval", "discovery", "--dataset", "coco20k", "--root", root, "--method", "backbone"]


KINDS = {
    "spair-pair": (spair_case, "PairAnnotation/test/*.json", JSON),
    "spair-image": (spair_case, "ImageAnnotation/*/*.json", JSON),
    "spair-layout": (spair_case, "Layout/large/test.txt", LIST),
    "davis-list": (davis_case, "ImageSets/2017/val.txt", LIST),
    "davis-mask": (davis_case, "Annotations/480p/*/*.png", MASK),
    "davis-scored": (scored_case, "Annotations/480p/*/00001.png", MASK),
    "voc-xml": (voc_case, "**/Annotations/*.xml", XML),
    "voc-list": (voc_case, "**/Main/trainval.txt", LIST),
    "coco-json": (coco_case, "annotations/*.json", JSON),
    "coco-list": (coco_case, "coco_20k_filenames.txt", LIST),
}


def campaign(kind, numbers, seconds=SECONDS, more=()):
    """Spoil one file after another, run the command on each, and say which were noticed.

    ``more``: further ways to spoil a file. Returns (exit statuses, the longest time in seconds, the number that took
    it).
    """
    prepare, pattern, ways = KINDS[kind]
    statuses, longest = [], (0.0, None)
    with TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        arguments = [*map(str, prepare(root)), "--quiet"]
        files = sorted(path for path in root.glob(pattern) if path.is_file())
        for number in numbers:
            pick = random.Random(f"{kind} {number}")
            path = pick.choice(files)
            good = path.read_bytes()
            way = pick.choice([*ways, *more])
            path.write_bytes(way(pick, good))
            said = io.StringIO()
            start = time.perf_counter()
            try:
                with redirect_stdout(io.StringIO()), redirect_stderr(said):
                    statuses.append(main(arguments))
            except BaseException as error:
                raise AssertionError(f"{kind} {number}, {way.__name__}: {type(error).__name__}: {error}") from error
            finally:
                path.write_bytes(good)
            spent = time.perf_counter() - start
            longest = max(longest, (spent, number))
            assert spent < seconds, f"{kind} {number}, {way.__name__}: {spent:.1f} s"
            assert statuses[-1] in (0, 1, 2), f"{kind} {number}, {way.__name__}: exit status {statuses[-1]}"
            assert "Traceback" not in said.getvalue()
            assert statuses[-1] == 0 or said.getvalue().strip(), f"{kind} {number}, {way.__name__}: not a word"
            if statuses[-1] == 2:
                # What was left out on the way is named before.
                *before, last = said.getvalue().strip().splitlines()
                assert last.startswith("lift-fast eval: "), f"{kind} {number}, {way.__name__}: {last[:200]}"
                assert all(each.startswith("skipped: ") for each in before), f"{kind} {number}, {way.__name__}"
            assert all(len(each) < 3000 for each in said.getvalue().splitlines()), f"{kind} {number}: a very long line"
            for masks in (root / "masks").glob("*/*/"):
                for mask in masks.iterdir():
                    mask.unlink()
                masks.rmdir()
    return statuses, longest


def stand_ins():
    """What the commands build, once: a small backbone, so that a run takes milliseconds."""
    backbone = tiny_backbone()
    methods = build_methods(["backbone"], backbone)
    return backbone, methods


@pytest.fixture
def small(monkeypatch):
    made = stand_ins()
    names = ("model", "random_weights", "facet", "layer", "stride", "dtype", "seed", "image_branch")
    record = {**dict.fromkeys(names, 0), "weights": {}}
    monkeypatch.setattr(eval_options, "build", lambda arguments: made)
    monkeypatch.setattr(eval_options, "record", lambda *_: record)


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_annotations_give_a_line(kind, small):
    statuses, _ = campaign(kind, [*range(COUNT), *FOUND.get(kind, ())])
    # The key points of images are compared with those of pairs, which are what counts.
    assert bool(any(statuses)) == (kind != "spair-image")
