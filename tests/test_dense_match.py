"""``dense_match`` against interpolation and argmax in float64, as in published evaluation code."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lift_fast import dense_match
from lift_fast.ops.dense_match import op, plain

TIE = 1e-6


def interpolate(maps, size):
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0].flatten(1).T


def brute_force(query_map, key_map, query_size, key_size, normalize):
    """Similarities of one image pair and how far each may be off in float32: both [Hq * Wq, Hk * Wk]."""

    def descriptors(maps, size):
        maps = maps.double()
        if normalize == "grid":
            maps = maps / maps.norm(dim=0, keepdim=True).clamp_min(1e-12)
        # Interpolation rounds on the scale of the longest cell around. Where cells nearly cancel, dividing by the
        # small norm of the interpolated descriptor magnifies that.
        longest = F.max_pool2d(maps.norm(dim=0, keepdim=True), 3, stride=1, padding=1)
        wide, scale = interpolate(maps, size), interpolate(longest, size)
        if normalize == "pixel":
            norm = wide.norm(dim=1, keepdim=True).clamp_min(1e-12)
            wide, scale = wide / norm, scale / norm
        return wide, scale.clamp_min(1.0)

    (query, query_scale), (key, key_scale) = descriptors(query_map, query_size), descriptors(key_map, key_size)
    table, tie = query @ key.T, TIE * query_scale * key_scale.T
    return table.masked_fill(~torch.isfinite(table), -torch.inf), tie.nan_to_num_(0.0, posinf=0.0)


def check(query_map, key_map, query_size, key_size, normalize="grid", points=None):
    result = dense_match(query_map, key_map, query_size, key_size, normalize=normalize, points=points, mutual=True)
    one_way = dense_match(query_map, key_map, query_size, key_size, normalize=normalize, points=points)
    assert torch.equal(result.xy, one_way.xy)
    for b in range(query_map.shape[0]):
        table, tie = brute_force(query_map[b], key_map[b], query_size, key_size, normalize)
        if points is None:
            rows = torch.arange(table.shape[0])
        else:
            at = points[b].floor().long()
            rows = at[:, 1] * query_size[1] + at[:, 0]
        lost = table[rows].amax(1) == -torch.inf
        assert torch.equal(one_way.valid[b], ~lost)
        assert (result.xy[b][lost] == -1).all()
        assert (result.similarity[b][lost] == -math.inf).all()
        rows = rows[~lost]
        x, y = result.xy[b][~lost].unbind(1)
        assert ((x >= 0) & (x < key_size[1]) & (y >= 0) & (y < key_size[0])).all()
        found = y * key_size[1] + x
        chosen, rounding = table[rows, found], tie[rows, found]
        assert (chosen + rounding >= (table[rows] - tie[rows]).amax(1)).all()
        assert (result.similarity[b][~lost].double() - chosen).abs().le(rounding).all()
        # Mutual: checked only where no other query pixel comes within rounding of the best.
        back = (table[:, found] - tie[:, found]).amax(0)
        clear = (table[:, found] + tie[:, found] >= back).sum(0) == 1
        mutual = table[:, found].argmax(0) == rows
        assert torch.equal(result.valid[b][~lost][clear], mutual[clear])
    return result


@pytest.mark.parametrize("normalize", ["grid", "pixel", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mutual_to_within_some_cells(normalize, dtype):
    """Every match of the pixels, and of a part of them, led back by a table of all pairs in float64."""
    query_size, key_size = (29, 41), (37, 23)
    query_map, key_map = torch.randn(2, 6, 4, 7, dtype=dtype), torch.randn(2, 6, 5, 3, dtype=dtype)
    key_map[0, :, 2] = query_map[0, :, 1, :3]
    some = torch.stack([torch.randint(41, (2, 400)), torch.randint(29, (2, 400))], dim=2)
    for points in (None, some, some[:, :3]):
        strict = dense_match(query_map, key_map, query_size, key_size, points=points, normalize=normalize, mutual=True)
        for cells in (0.0, 0.4, 1.0, 2.5):
            result = dense_match(
                query_map, key_map, query_size, key_size, points=points, normalize=normalize, mutual=cells
            )
            assert torch.equal(result.xy, strict.xy)
            assert torch.equal(result.similarity, strict.similarity)
            if cells == 0:
                assert torch.equal(result.valid, strict.valid)
            assert bool((result.valid | ~strict.valid).all())
            for b in range(2):
                table, tie = brute_force(query_map[b], key_map[b], query_size, key_size, normalize)
                x, y = result.xy[b].unbind(1)
                columns = table[:, y * key_size[1] + x]
                top = (columns + tie[:, y * key_size[1] + x]) >= columns.amax(0)
                # Only where one pixel is clearly the best.
                clear = top.sum(0) == 1
                back = columns.argmax(0)
                at = pixels_of(query_size) if points is None else points[b]
                miss = torch.stack([back % 41 - at[:, 0], back // 41 - at[:, 1]], dim=1) / torch.tensor(
                    [41 / 7, 29 / 4]
                )
                near = miss.double().norm(dim=1) <= cells
                assert torch.equal(result.valid[b][clear], near[clear])
                assert len(clear) < 400 or bool(clear.any())


def pixels_of(size):
    return torch.stack(torch.meshgrid(torch.arange(size[1]), torch.arange(size[0]), indexing="xy"), -1).view(-1, 2)


@pytest.mark.parametrize("mutual", [-1.0, math.nan, math.inf])
def test_a_tolerance_is_a_number_of_cells(mutual):
    maps = torch.randn(2, 1, 3, 2, 2)
    with pytest.raises(ValueError, match="number of cells"):
        dense_match(*maps, (4, 4), (4, 4), mutual=mutual)


sides = st.integers(1, 6)
pixels = st.integers(1, 23)


@settings(max_examples=120, deadline=None)
@given(
    query_grid=st.tuples(sides, sides),
    key_grid=st.tuples(sides, sides),
    query_size=st.tuples(pixels, pixels),
    key_size=st.tuples(pixels, pixels),
    channels=st.sampled_from((1, 2, 7)),
    batch=st.sampled_from((1, 2)),
    normalize=st.sampled_from(("grid", "pixel", None)),
    native=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_against_brute_force(query_grid, key_grid, query_size, key_size, channels, batch, normalize, native, seed):
    generator = torch.Generator().manual_seed(seed)
    query_map = torch.randn(batch, channels, *query_grid, generator=generator)
    key_map = torch.randn(batch, channels, *key_grid, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIFT_FAST_DISABLE_NATIVE", "0" if native else "1")
        check(query_map, key_map, query_size, key_size, normalize)


@pytest.mark.parametrize("normalize", ["grid", "pixel", None])
@pytest.mark.parametrize("smooth", [True, False])
def test_bounds_prune_without_loss(normalize, smooth, monkeypatch):
    # Large enough that patches are skipped; smooth maps leave many bounds open, rough ones prove at once.
    monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", "1")
    query_map, key_map = torch.randn(2, 1, 16, 24, 20)
    if smooth:
        query_map, key_map = (F.avg_pool2d(m, 5, stride=1, padding=2) for m in (query_map, key_map))
    looked = []
    exhaustive = plain.match_exhaustive
    monkeypatch.setattr(plain, "match_exhaustive", lambda d, *rest: looked.append(len(d)) or exhaustive(d, *rest))
    check(query_map, key_map, (61, 50), (70, 83), normalize)
    if normalize != "pixel" and not smooth:
        assert sum(looked) < 61 * 50 // 10


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("normalize", ["grid", "pixel", "none"])
def test_bounded_equals_exhaustive(normalize, native, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", native)
    query_map, key_map = torch.randn(2, 1, 8, 19, 23)
    arguments = query_map, key_map, [40, 52], [90, 71], None, normalize, True
    bounded, exhaustive = op.dense_match(*arguments), op.dense_match(*arguments, exhaustive=True)
    torch.testing.assert_close(bounded[0], exhaustive[0], rtol=0, atol=1e-5)
    assert (bounded[1] != exhaustive[1]).float().mean() < 2e-3


def test_points_are_rounded_down_and_equal_the_full_result():
    query_map, key_map = torch.randn(2, 2, 5, 4, 6)
    full = dense_match(query_map, key_map, (17, 31), (20, 9), mutual=True)
    points = torch.rand(2, 40, 2) * torch.tensor([31.0, 17.0])
    some = check(query_map, key_map, (17, 31), (20, 9), points=points)
    at = points.long()
    for b in range(2):
        rows = at[b, :, 1] * 31 + at[b, :, 0]
        assert torch.equal(some.xy[b], full.xy[b][rows])
        assert torch.equal(some.valid[b], full.valid[b][rows])
    assert dense_match(query_map, key_map, (17, 31), (20, 9), points=points[:, :0]).xy.shape == (2, 0, 2)


def test_an_image_matches_itself():
    maps = torch.randn(1, 32, 9, 12)
    result = dense_match(maps, maps, (36, 48), (36, 48), normalize="pixel")
    where = torch.stack(torch.meshgrid(torch.arange(36), torch.arange(48), indexing="ij")[::-1], -1).view(-1, 2)
    # Beyond the centres of the outermost cells the interpolation is constant: the lowest pixel wins.
    inner = ((where >= 2) & (where < torch.tensor([46, 34]))).all(1)
    assert torch.equal(result.xy[0][inner], where[inner])
    torch.testing.assert_close(result.similarity, torch.ones_like(result.similarity))


def test_equal_similarities_go_to_the_lowest_pixel():
    result = dense_match(torch.ones(1, 4, 3, 3), torch.ones(1, 4, 5, 7), (6, 6), (40, 30), normalize=None)
    assert (result.xy == 0).all()
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 1:3, 1:3] = 1
    result = dense_match(torch.ones(1, 1, 1, 1), maps, (1, 1), (16, 16), normalize=None)
    # The plateau of ones begins at the centre of cell (1, 1), between pixels 5 and 6.
    assert result.xy.tolist() == [[[6, 6]]]


@pytest.mark.parametrize("normalize", ["grid", "pixel", None])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_cells_that_are_not_finite_take_no_part(normalize, poison):
    query_map, key_map = torch.randn(2, 1, 6, 5, 5)
    query_map[0, 0, 1, 1] = key_map[0, 3, 2, 3] = poison
    result = dense_match(query_map, key_map, (20, 20), (20, 20), normalize=normalize)
    spoiled = F.interpolate((~torch.isfinite(query_map)).any(1, keepdim=True).float(), size=(20, 20), mode="bilinear")
    spoiled = spoiled.flatten() > 0
    assert not result.valid[0][spoiled].any()
    touched = F.interpolate((~torch.isfinite(key_map)).any(1, keepdim=True).float(), size=(20, 20), mode="bilinear")
    x, y = result.xy[0][result.valid[0]].unbind(1)
    assert (touched[0, 0, y, x] == 0).all()
    assert result.valid.any()


def test_zero_cells_have_similarity_zero():
    result = dense_match(torch.zeros(1, 3, 2, 2), torch.randn(1, 3, 4, 4), (5, 5), (9, 9))
    assert (result.similarity == 0).all()
    assert (result.xy == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    query_map, key_map = torch.randn(2, 1, 8, 6, 7).to(dtype)
    result = check(query_map, key_map, (13, 20), (25, 11))
    assert result.similarity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


MAPS = torch.randn(2, 1, 3, 4, 4)
BAD_CALLS = {
    "list": (TypeError, "list", lambda a, b: dense_match([1], b, (8, 8), (8, 8))),
    "integers": (TypeError, "int64", lambda a, b: dense_match(a.long(), b.long(), (8, 8), (8, 8))),
    "three dimensions": (ValueError, r"\[B, C, h, w\]", lambda a, b: dense_match(a[0], b[0], (8, 8), (8, 8))),
    "empty": (ValueError, "without empty", lambda a, b: dense_match(a[:0], b[:0], (8, 8), (8, 8))),
    "channels": (ValueError, "agree in B and C", lambda a, b: dense_match(a[:, :2], b, (8, 8), (8, 8))),
    "size": (ValueError, r"query_size must be \(H, W\)", lambda a, b: dense_match(a, b, 8, (8, 8))),
    "size zero": (
        ValueError,
        r"key_size\[1\] must be an integer >= 1, got 0",
        lambda a, b: dense_match(a, b, (8, 8), (8, 0)),
    ),
    "size float": (ValueError, "integer", lambda a, b: dense_match(a, b, (8.0, 8), (8, 8))),
    "mode": (ValueError, '"grid", "pixel" or None', lambda a, b: dense_match(a, b, (8, 8), (8, 8), normalize="cell")),
    "point shape": (
        ValueError,
        r"\[B, P, 2\]",
        lambda a, b: dense_match(a, b, (8, 8), (8, 8), points=torch.zeros(3, 2)),
    ),
    "point outside": (
        ValueError,
        r"1 of 2 do not, the first is \[8, 0\]",
        lambda a, b: dense_match(a, b, (8, 8), (8, 8), points=torch.tensor([[[0, 0], [8, 0]]])),
    ),
    "point negative": (
        ValueError,
        "inside",
        lambda a, b: dense_match(a, b, (8, 8), (8, 8), points=torch.tensor([[[-0.1, 0]]])),
    ),
    "point NaN": (
        ValueError,
        "nan",
        lambda a, b: dense_match(a, b, (8, 8), (8, 8), points=torch.full((1, 1, 2), math.nan)),
    ),
    "point bool": (
        TypeError,
        "bool",
        lambda a, b: dense_match(a, b, (8, 8), (8, 8), points=torch.ones(1, 1, 2).bool()),
    ),
    "point list": (TypeError, "got list", lambda a, b: dense_match(a, b, (8, 8), (8, 8), points=[[[1, 1]]])),
    "point infinite": (
        ValueError,
        "inf",
        lambda a, b: dense_match(a, b, (8, 8), (8, 8), points=torch.full((1, 1, 2), math.inf)),
    ),
    "point beyond every image": (
        ValueError,
        str(2**62),
        lambda a, b: dense_match(a, b, (8, 8), (8, 8), points=torch.full((1, 1, 2), 2**62)),
    ),
    "point sparse": (
        TypeError,
        "points must be dense, got torch.sparse_coo",
        lambda a, b: dense_match(a, b, (8, 8), (8, 8), points=torch.zeros(1, 1, 2).to_sparse()),
    ),
    "point float8": (
        TypeError,
        "float8_e5m2",
        lambda a, b: dense_match(a, b, (8, 8), (8, 8), points=torch.zeros(1, 1, 2).to(torch.float8_e5m2)),
    ),
    "point elsewhere": (
        ValueError,
        "points are on meta, the maps on cpu",
        lambda a, b: dense_match(a, b, (8, 8), (8, 8), points=torch.zeros(1, 1, 2, device="meta")),
    ),
    "sparse": (
        TypeError,
        "query_map must be dense, got torch.sparse_coo",
        lambda a, b: dense_match(a.to_sparse(), b, (8, 8), (8, 8)),
    ),
    "mkldnn": (
        TypeError,
        "key_map must be dense, got torch._mkldnn",
        lambda a, b: dense_match(a, b.to_mkldnn(), (8, 8), (8, 8)),
    ),
    "nested": (
        TypeError,
        "query_map must be dense, got a nested tensor",
        lambda a, b: dense_match(torch.nested.nested_tensor([a[0]]), b, (8, 8), (8, 8)),
    ),
    "float8": (
        TypeError,
        "float8_e4m3fn",
        lambda a, b: dense_match(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), (8, 8), (8, 8)),
    ),
    "complex": (TypeError, "complex64", lambda a, b: dense_match(a + 0j, b + 0j, (8, 8), (8, 8))),
    "size large": (
        ValueError,
        r"key_size\[1\] must be at most 1048576, got 4611686018427387904",
        lambda a, b: dense_match(a, b, (8, 8), (8, 2**62)),
    ),
    "size bool": (ValueError, "got True", lambda a, b: dense_match(a, b, (True, 8), (8, 8))),
    "size NaN": (ValueError, "got nan", lambda a, b: dense_match(a, b, (8, math.nan), (8, 8))),
    "mode tensor": (
        ValueError,
        '"grid", "pixel" or None, got a tensor',
        lambda a, b: dense_match(a, b, (8, 8), (8, 8), normalize=torch.ones(2)),
    ),
    "mode none": (ValueError, "got 'none'", lambda a, b: dense_match(a, b, (8, 8), (8, 8), normalize="none")),
    "mutual": (
        TypeError,
        "mutual must be True, False or a floating point number of cells such as 1.0, got 1",
        lambda a, b: dense_match(a, b, (8, 8), (8, 8), mutual=1),
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_named(case):
    error, message, call = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call(*MAPS)


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("normalize", ["grid", "pixel", None])
@pytest.mark.parametrize("points", [None, torch.tensor([[[0, 0], [7, 5]]])], ids=["every", "few"])
def test_views_that_are_lazily_negative_or_repeat_their_memory(points, normalize, native, monkeypatch):
    monkeypatch.setenv("LIFT_FAST_DISABLE_NATIVE", native)
    negative = torch.randn(2, 1, 3, 4, 4, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    for views in (
        negative,
        torch.randn(2, 1, 1, 4, 4).expand(2, 1, 3, 4, 4),
        torch.randn(2, 1, 3, 1, 4).expand(2, 1, 3, 4, 4),
    ):
        copies = views.clone().contiguous().resolve_neg()
        for one, other in ((views[0], copies[1]), (copies[0], views[1])):
            ours = dense_match(one, other, (6, 8), (5, 9), points=points, normalize=normalize)
            expected = dense_match(copies[0], copies[1], (6, 8), (5, 9), points=points, normalize=normalize)
            torch.testing.assert_close(ours.similarity, expected.similarity)
            # Between equal pixels rounding may decide.
            assert torch.equal(ours.xy, expected.xy) or views is not negative
    at = torch._neg_view(-points) if points is not None else None
    lazily = dense_match(*copies, (6, 8), (5, 9), points=at, normalize=normalize)
    assert torch.equal(lazily.xy, dense_match(*copies, (6, 8), (5, 9), points=points, normalize=normalize).xy)


@pytest.mark.parametrize("mutual", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_maps_without_content_give_results_without(dtype, mutual):
    maps = torch.empty(2, 1, 3, 4, 4, dtype=dtype, device="meta")
    for points, count in ((None, 48), (torch.empty(1, 5, 2, device="meta"), 5)):
        result = dense_match(*maps, (6, 8), (5, 9), points=points, mutual=mutual)
        assert [part.shape for part in result] == [(1, count), (1, count, 2), (1, count)]
        assert {part.device.type for part in result} == {"meta"}
        assert result.similarity.dtype == (dtype if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("points", [None, torch.tensor([[[0, 0], [7, 5]]])])
@pytest.mark.parametrize("mutual", [True, False])
def test_opcheck(points, mutual):
    torch.library.opcheck(torch.ops.lift_fast.dense_match.default, (*MAPS, [6, 8], [5, 9], points, "grid", mutual))


def test_compile_full_graph():
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: dense_match(a, b, (6, 8), (5, 9)), fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(*MAPS), dense_match(*MAPS, (6, 8), (5, 9)), strict=True):
        assert torch.equal(ours, expected)


def test_no_gradients():
    query_map, key_map = torch.randn(2, 1, 3, 2, 2, requires_grad=True)
    assert not dense_match(query_map, key_map, (4, 4), (5, 5)).similarity.requires_grad
