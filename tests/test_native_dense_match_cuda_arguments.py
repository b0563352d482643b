"""What ``dense_match``'s CUDA launches refuse; no GPU is needed."""

import pytest
import torch

from lift_fast import _native
from lift_fast.ops.dense_match import cuda as dense_match_cuda

needs_native = pytest.mark.skipif(not _native.can_run()[0], reason=_native.can_run()[1])
AXIS, SCALES, ADDRESS = (3, 9, 3, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 6), (0,) * 5, 1 << 20
GROUPS = {
    "table": ADDRESS,
    "rows": 9,
    "key_y": AXIS,
    "key_x": AXIS,
    "key_scale": SCALES,
    "query_y": AXIS,
    "query_x": AXIS,
    "band": (0, 3, 0, 3, 0, 0, 3),
    "similarity": ADDRESS,
    "index": ADDRESS,
}
POINTS = {
    **{name: GROUPS[name] for name in ("table", "key_y", "key_x", "key_scale", "similarity", "index")},
    "points": 5,
}
MUTUAL = {
    **{name: GROUPS[name] for name in ("table", "key_y", "key_x", "query_y", "query_x", "index")},
    "query_scale": SCALES,
    "valid": ADDRESS,
    "scratch": ADDRESS,
    "scratch_words": 8 * 37,
}


def call(kind, **changes):
    arguments = {"groups": GROUPS, "points": POINTS, "mutual": MUTUAL}[kind]
    getattr(_native.require(), f"dense_match_{kind}")(
        **{**arguments, "when": (0, True), "device": 0, "stream": 0, **changes}
    )


def axis_with(**changes):
    names = ("cells", "pixels", "strips", "low", "high", "first", "weight", "longest")
    return tuple(changes.get(name, value) for name, value in zip(names, AXIS, strict=True))


@needs_native
@pytest.mark.parametrize("kind", ["groups", "points", "mutual"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key_y": (1, 2)}, "expected an axis .* got a tuple of 2"),
        ({"key_y": axis_with(cells=0)}, "key needs cells, pixels and strips, got 0, 9 and 3"),
        ({"key_x": axis_with(pixels=-1)}, "key needs cells"),
        ({"key_x": axis_with(cells=(1 << 30) + 1)}, "key is too large"),
        ({"key_x": axis_with(pixels=1 << 40)}, "key is too large"),
        ({"key_x": axis_with(cells=1 << 29)}, "at most 2\\^31 - 2 pixels and 2\\^30 cells"),
        ({"key_x": axis_with(pixels=1 << 29)}, "at most 2\\^31 - 2 pixels and 2\\^30 cells"),
        ({"key_x": axis_with(strips=6)}, "key cannot have 6 strips of up to 6 pixels"),
        ({"key_x": axis_with(longest=10)}, "key cannot have 3 strips of up to 10 pixels"),
        ({"key_y": axis_with(low=0)}, "key low is null"),
        ({"key_y": axis_with(high=0)}, "key high is null"),
        ({"key_y": axis_with(first=2)}, "key first must be aligned to 4 bytes"),
        ({"key_y": axis_with(weight=0)}, "key weight is null"),
        ({"table": 0}, "table is null"),
        ({"table": 6}, "table must be aligned to 4 bytes"),
        ({"index": 0}, "index is null"),
        ({"index": 4}, "index must be aligned to 8 bytes"),
        ({"when": (6, True)}, "flag must be aligned to 4 bytes"),
        ({"when": (0,)}, "expected a condition .* got a tuple of 1"),
        ({"device": -1}, "device -1 does not exist"),
    ],
)
def test_bad_arguments_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=f"dense_match: .*{message}"):
        call(kind, **changes)


@needs_native
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("groups", {"query_y": axis_with(strips=0)}, "query needs cells"),
        ("groups", {"key_scale": (1, 2)}, "expected scales .* got a tuple of 2"),
        ("groups", {"key_scale": (ADDRESS, 0, *(ADDRESS,) * 3)}, "key scale_high is null"),
        ("groups", {"key_scale": (0, *(ADDRESS,) * 4)}, "key scale is null"),
        ("groups", {"key_scale": (*(ADDRESS,) * 3, 0, ADDRESS)}, "key scale_rows is null"),
        ("groups", {"key_scale": (*(ADDRESS,) * 4, 0)}, "key spans is null"),
        ("groups", {"key_scale": (*(ADDRESS,) * 4, ADDRESS | 8)}, "key spans must be aligned to 16 bytes"),
        ("groups", {"band": (1, 2)}, "expected a band .* got a tuple of 2"),
        ("groups", {"band": (0, 4, 0, 3, 0, 0, 3)}, r"strips \[0, 4\) x \[0, 3\) are not in the query image"),
        ("groups", {"band": (2, 2, 0, 3, 0, 0, 3)}, "are not in the query image"),
        ("groups", {"band": (0, 3, -1, 3, 0, 0, 3)}, "are not in the query image"),
        ("groups", {"band": (0, 3, 0, 3, 0, 1, 3)}, "the band's cells are not in the query image"),
        ("groups", {"band": (0, 3, 0, 3, 3, 0, 3)}, "the band's cells are not in the query image"),
        ("groups", {"band": (0, 3, 0, 3, 1, 0, 3)}, "a table of 9 rows does not hold rows of 3 cells"),
        ("groups", {"rows": 8}, "a table of 8 rows does not hold"),
        ("groups", {"similarity": 0}, "similarity is null"),
        ("points", {"points": -1}, r"expected 0 to 2\^31 - 1 points, got -1"),
        ("points", {"points": 1 << 31}, r"expected 0 to 2\^31 - 1 points"),
        ("mutual", {"query_scale": (0, 0, *(ADDRESS,) * 3)}, "query scale is null"),
        ("mutual", {"query_y": axis_with(pixels=2000, longest=700)}, "groups of 4200 query pixels are too large"),
        ("mutual", {"key_y": axis_with(cells=8001)}, "at most 24000 key cells fit the mutual check, got 24003"),
        ("mutual", {"valid": 0}, "valid is null"),
        ("mutual", {"scratch": 1 << 20 | 8}, "scratch must be aligned to 16 bytes"),
        ("mutual", {"scratch_words": 8 * 36}, "scratch must have 296 words, got 288"),
        ("mutual", {"query_scale": (ADDRESS,) * 5}, "scratch must have 656 words, got 296"),
    ],
)
def test_what_one_call_alone_refuses(kind, changes, message):
    with pytest.raises(ValueError, match=f"dense_match: .*{message}"):
        call(kind, **changes)


@needs_native
def test_limits_are_those_of_the_native_core():
    native = _native.require()
    assert native.most_mutual_group == dense_match_cuda.MOST_MUTUAL_GROUP
    assert native.most_mutual_cells == dense_match_cuda.MOST_MUTUAL_CELLS


@needs_native
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("kind", ["groups", "points", "mutual"])
def test_without_a_device_it_says_so(kind):
    with pytest.raises(RuntimeError, match="dense_match: "):
        call(kind)
