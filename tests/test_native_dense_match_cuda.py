"""``dense_match``'s CUDA kernels without a GPU: their own source runs on the CPU, against every pixel in float64."""

import ctypes
import struct
import subprocess

import compiled
import pytest
import torch
from brute_force import DEGENERATE, check_projections, check_spans, degenerate_map, pixel_similarities
from torch.nn import functional as F

from lift_fast import _native, devices
from lift_fast.kernels.strips import SPAN
from lift_fast.ops.dense_match import cuda as dense_match_cuda
from lift_fast.ops.dense_match import gpu as dense_match_gpu
from lift_fast.ops.dense_match import op
from lift_fast.ops.dense_match.bilinear import StretchedMap

numeric = pytest.mark.numeric("dense_match (CUDA C++)")
PROTOCOLS = ["grid", "pixel", "none"]
CPU = torch.device("cpu")


def raw(address, size):
    """The bytes at an address on the CPU, after their number; none at 0."""
    content = ctypes.string_at(address, size) if address else b""
    return struct.pack("<q", len(content)) + content


def axis(parts):
    cells, pixels, strips, low, high, first, weight, longest = parts
    sizes = struct.pack("<4q", cells, pixels, strips, longest)
    return sizes + b"".join(
        raw(address, 4 * count)
        for address, count in ((low, strips), (high, strips), (first, strips + 1), (weight, pixels))
    )


def condition(flag, wanted):
    return raw(flag, 4) + struct.pack("<q", wanted)


def image(y, x, scale):
    patches = y[2] * x[2]
    counts = (y[1] * x[1], patches, patches, y[1] * x[2], SPAN * patches)
    scales = (raw(address, 4 * count) for address, count in zip(scale, counts, strict=True))
    return axis(y) + axis(x) + b"".join(scales)


class Emulation:
    """Has the functions of the native core that ``lift_fast.ops.dense_match.cuda`` calls."""

    def __init__(self, program):
        self.process = subprocess.Popen(
            [str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        # Warps in ascending, descending or random order; bytes of shared memory that a block may use.
        self.order, self.seed, self.shared_block = 0, 0, 227 << 10
        self.calls = []

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def run(self, kind, content, *results):
        """Send one call and write the answer to the results: (address, size)."""
        # The spans of patches come with every search of cosines.
        self.calls += [kind] if kind != b"s" else []
        self.process.stdin.write(kind + struct.pack("<3q", self.order, self.seed, self.shared_block) + content)
        self.process.stdin.flush()
        for address, size in results:
            answer = self.process.stdout.read(size)
            if len(answer) != size:
                raise AssertionError(self.process.stderr.read().decode()[-6000:])
            ctypes.memmove(address, answer, size)

    def dense_match_spans(self, gram, y, x, high, spans, device, stream):
        patches = y[2] * x[2]
        content = raw(gram, 8 * 5 * y[0] * x[0]) + axis(y) + axis(x) + raw(high, 4 * patches)
        self.run(b"s", content + raw(spans, 4 * SPAN * patches), (spans, 4 * SPAN * patches))

    def dense_match_groups(
        self, table, rows, key_y, key_x, key_scale, query_y, query_x, band, similarity, index, when, device, stream
    ):
        content = raw(table, 4 * rows * key_y[0] * key_x[0]) + struct.pack("<q", rows)
        content += image(key_y, key_x, key_scale) + axis(query_y) + axis(query_x) + struct.pack("<7q", *band)
        pixels = query_y[1] * query_x[1]
        content += raw(similarity, 4 * pixels) + raw(index, 8 * pixels) + condition(*when)
        self.run(b"g", content, (similarity, 4 * pixels), (index, 8 * pixels))

    def dense_match_points(self, table, points, key_y, key_x, key_scale, similarity, index, when, device, stream):
        content = raw(table, 4 * points * key_y[0] * key_x[0]) + struct.pack("<q", points)
        content += image(key_y, key_x, key_scale)
        content += raw(similarity, 4 * points) + raw(index, 8 * points) + condition(*when)
        self.run(b"p", content, (similarity, 4 * points), (index, 8 * points))

    def dense_match_mutual(
        self, table, query_y, query_x, query_scale, key_y, key_x, index, valid, scratch, words, when, device, stream
    ):
        query_cells, key_cells = query_y[0] * query_x[0], key_y[0] * key_x[0]
        pixels = query_y[1] * query_x[1]
        content = raw(table, 4 * query_cells * key_cells) + image(query_y, query_x, query_scale)
        content += axis(key_y) + axis(key_x) + raw(index, 8 * pixels)
        content += raw(valid, pixels) + struct.pack("<q", words) + condition(*when)
        assert not any(ctypes.string_at(scratch, 4 * words))
        self.run(b"m", content, (valid, pixels))


@pytest.fixture(scope="module")
def program():
    return compiled.emulation("dense_match_emulate")


@pytest.fixture
def emulation(program, monkeypatch):
    """``lift_fast.ops.dense_match`` on the CPU as on a GPU; its allocations are full of NaN."""
    served = Emulation(program)
    monkeypatch.setattr(_native, "require", lambda: served)
    monkeypatch.setattr(devices, "cuda_runs", lambda device: (True, "as if"))
    monkeypatch.setattr(dense_match_cuda, "_where", lambda device: (0, 0))
    yield served
    served.close()


def maps(channels, query_grid, key_grid):
    seed = int(torch.randint(1 << 30, ()))
    torch.manual_seed(seed)
    print("seed", seed)
    return torch.randn(channels, *query_grid), torch.randn(channels, *key_grid)


def run(query_map, key_map, query_size, key_size, normalize="grid", points=None, mutual=True):
    points = None if points is None else points[None]
    similarity, xy, valid = op.dense_match(
        query_map[None], key_map[None], query_size, key_size, points, normalize, mutual, backend="cuda"
    )
    index = torch.where(xy[0, :, 0] < 0, -1, xy[0, :, 1] * key_size[1] + xy[0, :, 0])
    return similarity[0], index, valid[0]


def check(query_map, key_map, query_size, key_size, normalize="grid", points=None):
    similarity, index, valid = run(query_map, key_map, query_size, key_size, normalize, points)
    values, tie = pixel_similarities(query_map, key_map, query_size, key_size, normalize)
    rows = torch.arange(len(values)) if points is None else points[:, 1] * query_size[1] + points[:, 0]
    lost = values[rows].amax(1) == -torch.inf
    assert torch.equal(index == -1, lost)
    assert bool((similarity[lost] == -torch.inf).all())
    assert not bool(valid[lost].any())
    rows, index, similarity, valid = rows[~lost], index[~lost], similarity[~lost], valid[~lost]
    found, rounding = values[rows, index], tie[rows, index]
    assert bool((found + rounding >= (values - tie)[rows].amax(1)).all())
    assert bool(((similarity.double() - found).abs() <= rounding).all())
    # Mutual: checked only where no other query pixel comes within rounding of the best.
    clear = (values + tie)[:, index] >= (values - tie)[:, index].amax(0)
    clear = clear.sum(0) == 1
    assert torch.equal(valid[clear], (values[:, index].argmax(0) == rows)[clear])


# (query grid, key grid, query size, key size): one cell, one row, odd and prime, fewer pixels than cells, one pixel, as
# many as cells, groups of more than 64 pixels.
SHAPES = [
    ((3, 2), (2, 4), (13, 7), (11, 19)),
    ((1, 1), (3, 2), (3, 5), (7, 6)),
    ((2, 3), (1, 1), (5, 4), (5, 7)),
    ((5, 4), (4, 7), (3, 2), (2, 11)),
    ((2, 2), (3, 3), (1, 1), (1, 1)),
    ((4, 3), (3, 5), (4, 3), (3, 5)),
    ((1, 5), (4, 1), (11, 17), (23, 1)),
    ((2, 2), (2, 3), (31, 23), (13, 17)),
]


@numeric
@pytest.mark.parametrize("normalize", PROTOCOLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_brute_force(shape, normalize, emulation):
    check(*maps(7, *shape[:2]), *shape[2:], normalize)
    # One table served the search and the mutual check, which two launches of each may share.
    assert emulation.calls in ([b"g", b"m"], [b"g", b"m"] * 2)


@numeric
@pytest.mark.parametrize("normalize", PROTOCOLS)
def test_random_shapes(normalize, emulation):
    """Every path: rows that can be read four cells at a time or not, orders of warps, bounds in memory or not."""
    random = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))
    print("seed", random.initial_seed())

    def draw(*limits):
        return tuple(int(torch.randint(limit, (), generator=random)) + 1 for limit in limits)

    for number in range(12):
        emulation.order, emulation.seed = number % 3, number
        emulation.shared_block = (227 << 10) if number % 4 else 0
        shape = draw(5, 5), draw(5, 6), draw(17, 17), draw(21, 40)
        print(shape)
        torch.manual_seed(int(torch.randint(1 << 30, (), generator=random)))
        check(torch.randn(5, *shape[0]), torch.randn(5, *shape[1]), *shape[2:], normalize)


@numeric
@pytest.mark.parametrize("normalize", PROTOCOLS)
def test_smooth_maps(normalize, emulation):
    """Most patches are skipped; strips of more patches than a warp has lanes."""
    query_map, key_map = maps(8, (3, 4), (10, 9))
    wide = F.interpolate(key_map[None], size=(23, 41), mode="bilinear")[0]
    check(query_map, wide, (9, 13), (31, 53), normalize)


@numeric
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("channels", [1, 2, 3, 40])
def test_projections_change_no_cosine(kind, channels, emulation, monkeypatch):
    """They divide by how far a patch's corners lie apart. Without them every patch that its range leaves is visited."""
    seed = int(torch.randint(1 << 30, ()))
    print("seed", seed)
    cells = [degenerate_map(kind, seed + h, channels, h, w) for h, w in ((3, 4), (4, 7))]
    sizes = (9, 15), (13, 22)
    points = torch.tensor([[3, 4], [14, 8], [0, 0], [11, 7]])
    check_projections(run, dense_match_cuda, monkeypatch, cells, sizes, points)


@numeric
def test_spans_have_the_lengths_of_projections(emulation):
    image = StretchedMap(torch.randn(12, 6), (3, 4), (17, 29))
    check_spans(dense_match_gpu._Cosines(image, "cuda").scales(image.strips()).spans, image)


@numeric
def test_patches_without_projections_are_passed_over(emulation, monkeypatch):
    """After its first matches a search looks nowhere else if all spans are zero."""
    arguments = *maps(6, (2, 2), (5, 6)), (5, 7), (23, 29), "pixel"
    right = run(*arguments, mutual=False)[0]
    spans = dense_match_cuda.spans
    monkeypatch.setattr(dense_match_cuda, "spans", lambda *arguments: spans(*arguments).zero_())
    wrong = run(*arguments, mutual=False)[0]
    assert bool((wrong <= right).all())
    assert not torch.equal(wrong, right)


@numeric
def test_large_maps_take_more_warps(emulation):
    query_map, key_map = maps(4, (1, 2), (89, 97))
    emulation.order = 2
    check(query_map, key_map, (2, 3), (100, 103))


@numeric
@pytest.mark.parametrize("normalize", PROTOCOLS)
def test_points(normalize, emulation):
    query_map, key_map = maps(5, (3, 4), (4, 3))
    points = torch.stack([torch.randint(37, (7,)), torch.randint(29, (7,))], dim=1)
    points[0] = torch.tensor([36, 28])
    points[1] = 0
    check(query_map, key_map, (29, 37), (23, 31), normalize, points)
    assert set(emulation.calls) == {b"p"}


@numeric
def test_many_points_are_looked_up(emulation):
    query_map, key_map = maps(3, (1, 2), (2, 2))
    points = torch.stack([torch.randint(5, (40,)), torch.randint(4, (40,))], dim=1)
    check(query_map, key_map, (4, 5), (5, 6), "pixel", points)
    assert emulation.calls == [b"g", b"m"]


@numeric
def test_a_row_that_no_block_holds_has_no_mutual_check(emulation, monkeypatch):
    monkeypatch.setattr(dense_match_cuda, "MOST_MUTUAL_CELLS", 5)
    query_map, key_map = maps(3, (2, 2), (2, 3))
    check(query_map, key_map, (7, 7), (5, 5))
    assert b"m" not in emulation.calls


@numeric
@pytest.mark.parametrize("normalize", ["grid", "pixel"])
def test_bands(normalize, emulation, monkeypatch):
    """Tables of a part of the query image; the mutual check has no table then, and a second search does it."""
    monkeypatch.setattr(dense_match_gpu, "_TABLE_BUDGET", 4 * 20 * 4)
    query_map, key_map = maps(3, (3, 2), (5, 4))
    check(query_map, key_map, (5, 4), (9, 10), normalize)
    # As many more as the matched pixels need.
    assert emulation.calls[:3] == [b"g", b"g", b"p"]
    assert set(emulation.calls[3:]) == {b"p"}


@numeric
def test_large_groups_have_no_mutual_check(emulation, monkeypatch):
    monkeypatch.setattr(dense_match_cuda, "MOST_MUTUAL_GROUP", 8)
    query_map, key_map = maps(3, (2, 2), (2, 2))
    check(query_map, key_map, (7, 7), (5, 5))
    assert b"m" not in emulation.calls


@numeric
@pytest.mark.parametrize("normalize", PROTOCOLS)
def test_flat_images_go_to_the_first_pixel(normalize, emulation):
    query_map, key_map = maps(4, (2, 2), (3, 2))
    # Products without rounding, because a matrix product of equal columns may differ in the last bit.
    key_map = torch.zeros_like(key_map)
    key_map[0] = 1
    similarity, index, _ = run(query_map, key_map, (4, 5), (7, 6), normalize)
    values, _ = pixel_similarities(query_map, key_map, (4, 5), (7, 6), normalize)
    torch.testing.assert_close(similarity.double(), values.amax(1), rtol=0, atol=1e-5)
    assert bool((index == 0).all())


@numeric
@pytest.mark.parametrize("normalize", ["pixel", "none"])
def test_zeros_of_either_sign_are_equal(normalize, emulation):
    """Such as a zero vector's products, with the first of them in any lane."""
    image = StretchedMap(torch.randn(40, 3), (5, 8), (23, 41))
    axes = image.strips()
    scales = dense_match_gpu._Cosines(image, "cuda").scales(axes) if normalize == "pixel" else None
    table = torch.where(torch.rand(6, 40) < 0.5, -0.0, 0.0)
    similarity, index = torch.empty(6), torch.empty(6, dtype=torch.int64)
    dense_match_cuda.match(table, axes, scales, similarity, index)
    assert index.tolist() == [0] * 6
    assert similarity.tolist() == [0.0] * 6
    query = StretchedMap(torch.zeros(4, 3), (2, 2), (3, 2))
    similarity, index = torch.empty(6), torch.empty(6, dtype=torch.int64)
    query_axes = query.strips()
    whole = dense_match_gpu.Band((0, query_axes[0].count), (0, query_axes[1].count), 0, 0, 2)
    dense_match_cuda.match(table[:4], axes, scales, similarity, index, query_axes, whole)
    assert index.tolist() == [0] * 6


@numeric
@pytest.mark.parametrize("normalize", PROTOCOLS)
def test_equal_pixels_lead_back_to_the_first(normalize, emulation):
    ones = torch.zeros(3, 3, 4)
    ones[1] = 1
    _, index, valid = run(ones, ones, (13, 11), (6, 7), normalize)
    assert bool((index == 0).all())
    assert valid.nonzero().flatten().tolist() == [0]


@numeric
def test_a_plateau_begins_at_its_first_pixel(emulation):
    cells = torch.zeros(1, 4, 4)
    cells[0, 1:3, 1:3] = 1
    _, index, valid = run(torch.ones(1, 2, 2), cells, (3, 3), (16, 16), "none")
    # Ones begin at the centre of cell (1, 1), between pixels 5 and 6.
    assert index.tolist() == [6 * 16 + 6] * 9
    assert valid.tolist() == [True] + [False] * 8


@numeric
@pytest.mark.parametrize("normalize", PROTOCOLS)
def test_an_image_matches_itself(normalize, emulation):
    cells = F.normalize(torch.randn(16, 3, 4), dim=0)
    similarity, index, valid = run(cells, cells, (12, 16), (12, 16), "pixel")
    inner = torch.zeros(12, 16, dtype=torch.bool)
    # Beyond the centres of the outermost cells the interpolation is constant: the lowest pixel stands for all.
    inner[2:10, 2:14] = True
    assert torch.equal(index[inner.flatten()], torch.arange(192)[inner.flatten()])
    assert bool(valid[inner.flatten()].all())
    torch.testing.assert_close(similarity, torch.ones(192))


@numeric
@pytest.mark.parametrize("normalize", PROTOCOLS)
@pytest.mark.parametrize("sizes", [((7, 8), (9, 7)), ((9, 3), (15, 20)), ((3, 3), (3, 4)), ((2, 15), (1, 3))], ids=str)
def test_cells_that_are_not_finite(sizes, normalize, emulation):
    """In every row and column, with pixels at the centres of cells and without."""
    for y, x in ((0, 2), (1, 0), (2, 1)):
        query_map, key_map = maps(4, (3, 3), (3, 4))
        query_map[1, y, x] = torch.nan
        key_map[0, 2 - y, x + 1] = torch.inf
        query_map[:, x, 2 - y] = 0
        key_map[:, 0, 0] = 0
        check(query_map, key_map, *sizes, normalize)
        check(query_map, key_map, *sizes, normalize, torch.tensor([[0, 0]]))
        check(key_map, query_map, *sizes[::-1], normalize)
    key_map[0] = torch.nan
    _, index, valid = run(query_map, key_map, (3, 2), (4, 3), normalize)
    assert bool((index == -1).all())
    assert not bool(valid.any())
    assert bool((run(query_map, key_map, (3, 2), (4, 3), normalize, torch.tensor([[1, 2]]))[1] == -1).all())


@numeric
@pytest.mark.parametrize("normalize", PROTOCOLS)
def test_strips_of_single_cells_are_joined_where_all_is_finite(normalize, emulation):
    """Three pixels to a cell: one of two launches of each kernel does nothing."""
    query_map, key_map = maps(4, (3, 4), (4, 3))
    sizes = (9, 12), (12, 9)
    points = torch.tensor([[4, 4], [0, 8]])
    check(query_map, key_map, *sizes, normalize)
    check(query_map, key_map, *sizes, normalize, points)
    assert emulation.calls == [b"g", b"m"] * 2 + [b"p"] * 4
    query = StretchedMap(torch.zeros(12, 2), (3, 4), (9, 12))
    assert [axis.count for axis in query.strips()] == [5, 7]
    assert [axis.count for axis in query.strips(True)] == [3, 4]
    query_map[1, 1, 2] = key_map[0, 2, 1] = torch.nan
    check(query_map, key_map, *sizes, normalize)
    check(query_map, key_map, *sizes, normalize, points)


@numeric
@pytest.mark.parametrize("normalize", PROTOCOLS)
@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1e19, 3e38])
def test_magnitudes(scale, normalize, emulation):
    """Products beyond float32, and a cell of another magnitude among them."""
    query_map, key_map = (part.clamp(-1, 1) for part in maps(4, (3, 3), (3, 4)))
    query_map[:, 1, 1] *= 1e-3
    key_map[:, 0, 3] *= 1e-5
    large = query_map * scale, key_map * scale
    similarity, index, _ = run(*large, (7, 8), (9, 7), normalize)
    if normalize == "none":
        values = pixel_similarities(query_map, key_map, (7, 8), (9, 7), normalize)[0]
        torch.testing.assert_close(similarity, (values.amax(1) * scale * scale).float(), rtol=1e-5, atol=1e-30)
    else:
        # Cells and pixels with a norm below 1e-12 are divided by 1e-12.
        values = pixel_similarities(*large, (7, 8), (9, 7), normalize)[0]
        most = float(values.abs().amax())
        torch.testing.assert_close(similarity.double(), values.amax(1), rtol=0, atol=2e-5 * most)
    chosen = values.gather(1, index[:, None])[:, 0]
    assert bool((chosen >= values.amax(1) - 2e-5 * float(values.abs().amax())).all())


@numeric
def test_what_overflows_takes_no_part(emulation):
    """A table that no maps give: the slope between similarities of either sign is infinite."""
    image = StretchedMap(torch.zeros(6, 3), (2, 3), (5, 7))
    table = torch.full((1, 6), 3e38)
    table[0, 2] = -3e38
    similarity, index = torch.empty(1), torch.empty(1, dtype=torch.int64)
    dense_match_cuda.match(table, image.strips(), None, similarity, index)
    assert (float(similarity), int(index)) == (float(torch.tensor(3e38)), 0)
    dense_match_cuda.match(table * 2, image.strips(), None, similarity, index)
    assert (float(similarity), int(index)) == (-torch.inf, -1)


@numeric
def test_batches_through_the_operator(emulation):
    query_map, key_map = torch.randn(2, 3, 6, 2, 3)
    found = op.dense_match(query_map, key_map, [5, 7], [6, 5], None, "grid", True, backend="cuda")
    for b in range(3):
        one = run(query_map[b], key_map[b], (5, 7), (6, 5))
        assert torch.equal(found[0][b], one[0])
        assert torch.equal(found[2][b], one[2])


@numeric
@pytest.mark.parametrize("normalize", ["grid", "pixel"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways_are_two_calls(shape, normalize, emulation):
    """As a graph records them: without looking repeated matches up once."""
    query, key = maps(6, *shape[:2])
    query[:, -1, -1] = torch.nan
    sizes = shape[2:]
    similarity, xy, back = op.match_both_ways(query[None], key[None], *sizes, None, normalize, "cuda")
    values, index, _ = run(query, key, *sizes, normalize, mutual=False)
    assert torch.equal(similarity[0], values)
    assert torch.equal(torch.where(xy[0, :, 0] < 0, -1, xy[0, :, 1] * sizes[1][1] + xy[0, :, 0]), index)
    lost = index < 0
    assert (back[0, lost] == -1).all()
    if not bool(lost.all()):
        _, there, _ = run(key, query, *sizes[::-1], normalize, xy[0, ~lost], mutual=False)
        assert torch.equal(back[0, ~lost, 1] * sizes[0][1] + back[0, ~lost, 0], there)


def test_tensors_that_do_not_fit_are_refused():
    key = StretchedMap(torch.zeros(6, 2), (2, 3), (5, 7))
    axes = key.strips()
    good = torch.zeros(4, 6), axes, None, torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    for position, wrong, message in (
        (0, torch.zeros(4, 5), r"table must be \[4, 6\] torch\.float32 on cpu, got \[4, 5\]"),
        (0, torch.zeros(4, 6).double(), r"got \[4, 6\] torch\.float64"),
        (0, torch.zeros(6, 4).t(), r"table must be contiguous, got strides \(1, 4\)"),
        (3, torch.zeros(3), r"similarity must be \[4\]"),
        (4, torch.zeros(4, dtype=torch.int32), r"index must be \[4\] torch\.int64"),
        (1, (axes[0]._replace(first=axes[0].first[1:]), axes[1]), r"key y first must be \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            dense_match_cuda.match(*good[:position], wrong, *good[position + 1 :])
    with pytest.raises(ValueError, match=r"table must be \[6, 6\]"):
        dense_match_cuda.mutual(torch.zeros(6, 5), axes, None, axes, torch.zeros(35).long(), torch.zeros(35).bool())
    with pytest.raises(ValueError, match=r"index must be \[35\]"):
        dense_match_cuda.mutual(torch.zeros(6, 6), axes, None, axes, torch.zeros(34).long(), torch.zeros(35).bool())
    with pytest.raises(ValueError, match=r"valid must be \[35\]"):
        dense_match_cuda.mutual(torch.zeros(6, 6), axes, None, axes, torch.zeros(35).long(), torch.zeros(34).bool())
    with pytest.raises(ValueError, match=r"flag must be \[\] torch\.int32"):
        dense_match_cuda.match(*good, when=dense_match_cuda.When(torch.zeros(()), True))


class TestChoice:
    """The kernel that runs a call."""

    def test_the_native_one_comes_first(self, monkeypatch):
        monkeypatch.setattr(devices, "cuda_runs", lambda device: (True, "as if"))
        assert dense_match_gpu.select(CPU) == "cuda"
        for wish in ("cuda", "triton"):
            assert dense_match_gpu.select(CPU, wish) == wish
        monkeypatch.setenv("LIFT_FAST_DISABLE_TRITON", "1")
        with pytest.raises(RuntimeError, match="triton kernel cannot run: switched off by LIFT_FAST_DISABLE_TRITON=1"):
            dense_match_gpu.select(CPU, "triton")

    def test_where_it_cannot_run_triton_does(self, monkeypatch):
        monkeypatch.setattr(devices, "cuda_runs", lambda device: (False, "no such luck"))
        assert dense_match_gpu.select(CPU) == "triton"
        with pytest.raises(RuntimeError, match="cuda kernel cannot run: no such luck"):
            dense_match_gpu.select(CPU, "cuda")
        with pytest.raises(RuntimeError, match="no such luck"):
            op.dense_match(*torch.ones(2, 1, 1, 2, 2), [3, 3], [3, 3], None, "grid", False, backend="cuda")
        with pytest.raises(ValueError, match='"cuda", "triton" or None, got \'tritom\''):
            dense_match_gpu.select(CPU, "tritom")

    def test_switched_off(self, monkeypatch):
        monkeypatch.setenv("LIFT_FAST_DISABLE_CUDA", "1")
        reason = "switched off by LIFT_FAST_DISABLE_CUDA=1"
        assert devices.cuda_runs(torch.device("cuda", 0)) == (False, reason)
        assert dense_match_gpu.select(CPU) == "triton"

    def test_the_mutual_check_is_the_native_ones(self, monkeypatch):
        image = StretchedMap(torch.zeros(6, 2), (2, 3), (5, 5))
        monkeypatch.setattr(devices, "cuda_runs", lambda device: (True, "as if"))
        assert dense_match_gpu.checks_mutual(image, image, None)
        assert not dense_match_gpu.checks_mutual(image, image, None, "triton")
        assert not dense_match_gpu.checks_mutual(image, image, torch.zeros(3, 2, dtype=torch.int64))
        monkeypatch.setattr(devices, "cuda_runs", lambda device: (False, "no such luck"))
        assert not dense_match_gpu.checks_mutual(image, image, None)
