"""``nearest``'s Triton kernels against float64 brute force: on a GPU where there is one, else interpreted."""

import math
import os
from functools import partial

import pytest
import torch
from brute_force import in_window, unit

from lift_fast import nearest
from lift_fast.ops.nearest import gpu as nearest_gpu
from lift_fast.ops.nearest import plain
from lift_fast.ops.nearest.op import nearest_by

pytest.importorskip("triton")
from lift_fast.kernels import launch, nearest_rows, tiles
from lift_fast.kernels import nearest as kernel
from lift_fast.kernels import nearest_float32 as float32
from lift_fast.kernels import nearest_groups as groups

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

numeric = pytest.mark.numeric("nearest")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter is slow, and float32 is searched for in float16 as well.
FEWER = DTYPES if DEVICE.type == "cuda" else [torch.float32, torch.bfloat16]
TIE = 1e-6
STREAMS = [
    groups.Stream(tiles.Tile(16, 64, 1, 16, 4, 2), "threads"),
    groups.Stream(tiles.Tile(32, 128, 1, 32, 4, 3), "tma"),
]
# Of NumPy, which the interpreter computes with.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning"),
]


def needs_feed(stream):
    if stream.feed == "tma" and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a tensor memory accelerator")


def sets(n, m, channels, dtype=torch.float32, batch=1):
    seed = int(torch.randint(1 << 30, ()))
    torch.manual_seed(seed)
    print("seed", seed)
    return torch.randn(batch, n, channels).to(dtype), torch.randn(batch, m, channels).to(dtype)


def run(query, key, k=1, mutual=False, ratio=None, window=None, normalize=True, fast=False, stream=None):
    search = partial(nearest_gpu.search, stream=stream)
    arguments = (query.to(DEVICE), key.to(DEVICE), k, mutual, ratio, window, normalize)
    assert nearest_gpu.fits(arguments[0], arguments[1], k, window)[0]
    return [part.cpu() for part in nearest_by(search, *arguments, fast=fast)]


def similarities(query, key, window=None, normalize=True):
    """[B, n, m] float64; -inf where a pair takes no part."""
    table = []
    for queries, keys in zip(query.double(), key.double(), strict=True):
        if normalize:
            queries, keys = unit(queries), unit(keys)
        one = queries @ keys.T
        one.masked_fill_(~torch.isfinite(one), -torch.inf)
        if window is not None:
            one[~in_window(window, *one.shape)] = -torch.inf
        table.append(one)
    return torch.stack(table)


def check(query, key, k=1, mutual=False, ratio=None, window=None, normalize=True, fast=False, tie=TIE, stream=None):
    """Any choice within ``tie`` of the best is right, because rounding may decide."""
    similarity, index, valid = run(query, key, k, mutual, ratio, window, normalize, fast, stream)
    table = similarities(query, key, window, normalize)
    finite = torch.isfinite(table)
    scale = max(1.0, float(table[finite].abs().max())) if finite.any() else 1.0
    tie *= scale
    ranked = table.sort(dim=2, descending=True).values
    ranked = torch.nn.functional.pad(ranked, (0, max(0, max(k, 2) - ranked.shape[2])), value=-torch.inf)
    there = torch.isfinite(ranked[:, :, :k])
    assert similarity.shape == index.shape == there.shape
    assert valid.shape == index.shape[:2]
    assert torch.equal(index >= 0, there)
    assert bool((similarity[~there] == -torch.inf).all() & (index[~there] == -1).all())
    found = table.gather(2, index.clamp_min(0))
    assert bool(((found - ranked[:, :, :k]).abs()[there] <= tie).all())
    assert bool(((similarity.double() - found).abs()[there] <= tie).all())
    ordered = index.masked_fill(~there, -1).sort(dim=2).values
    assert not bool(((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any())
    assert bool((similarity[:, :, 1:] <= similarity[:, :, :-1]).all())
    first = index[:, :, 0].clamp_min(0)
    expected, certain = there[:, :, 0].clone(), torch.ones_like(valid)
    if mutual:
        column = table.gather(2, first[:, None, :].expand(-1, table.shape[1], -1))
        best = column.amax(1)
        own = torch.diagonal(column, dim1=1, dim2=2)
        certain &= (column >= best[:, None] - 2 * tie).sum(1) == 1
        certain |= own < best - 2 * tie
        expected &= own == best
    if ratio is not None:
        left, right = 1 - ranked[:, :, 0], ratio**2 * (1 - ranked[:, :, 1])
        expected &= left <= right
        certain &= ~((left - right).abs() <= 4 * tie)
    assert torch.equal(valid[certain], expected[certain])
    return similarity, index, valid


@numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "m", "channels", "options"),
    [
        (1, 1, 1, {"mutual": True}),
        (17, 31, 33, {"mutual": True}),
        (7, 300, 16, {"k": 2, "ratio": 0.97}),
        (13, 2, 5, {"k": 5, "mutual": True}),
        (5, 97, 8, {"k": 4, "normalize": False}),
        (3, 37, 17, {"k": 32}),
        (31, 13, 3, {"ratio": 0.9, "mutual": True}),
    ],
    ids=str,
)
def test_against_brute_force(n, m, channels, options, dtype):
    check(*sets(n, m, channels, dtype, batch=2 if n * m < 100 else 1), **options)


@numeric
@pytest.mark.parametrize(
    ("window", "frames", "k"),
    [
        ([1, 3, 5, 3, 5], 2, 3),
        ([0, 4, 3, 4, 3], 1, 1),
        ([1, 3, 4, 2, 7], 1, 2),
        ([1000000, 2, 3, 3, 2], 2, 1),
        ([2, 1, 1, 1, 9], 1, 9),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", FEWER, ids=str)
def test_window(window, frames, k, dtype):
    _, query_h, query_w, key_h, key_w = window
    check(*sets(query_h * query_w, frames * key_h * key_w, 6, dtype), k=k, window=window, mutual=True)


@numeric
def test_window_of_several_patches():
    # One dtype: the interpreter is slow.
    check(*sets(9 * 17, 9 * 17, 6, torch.bfloat16), window=[1, 9, 17, 9, 17], mutual=True)


@numeric
@pytest.mark.parametrize("most_blocks", [float32.MOST_BLOCKS, 0])
@pytest.mark.parametrize("options", [{"mutual": True}, {"ratio": 0.97}, {"k": 3}], ids=str)
def test_float32_search_in_float16(options, most_blocks, monkeypatch):
    """With and without the queries that are searched again in float32."""
    monkeypatch.setattr(nearest_gpu, "_SMALL", 0)
    monkeypatch.setattr(float32, "MOST_BLOCKS", most_blocks)
    monkeypatch.setattr(nearest_gpu, "_BOUNDS_BUDGET", 1 << 10)
    query, key = sets(11, 140, 24)
    # Equal in float16.
    key[0, 70:75] = key[0, 10:15] * (1 + 1e-5 * torch.randn(5, 24))
    query[0, :5] = key[0, 10:15]
    check(query, key, **options)


@numeric
@pytest.mark.parametrize("dtype", FEWER, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"mutual": True}, {"mutual": True, "ratio": 0.98}, {"k": 3}, {"window": [2, 5, 9, 5, 9], "mutual": True}],
    ids=str,
)
def test_many_tiles(options, dtype, monkeypatch):
    """Duplicates in several tiles of queries and of keys."""
    monkeypatch.setattr(nearest_gpu, "_SMALL", 0)
    monkeypatch.setattr(kernel, "default_tile", lambda *_: tiles.Tile(16, 32, 1, 16, 4, 2))
    query, key = sets(45, 90, 12, dtype)
    key[0, 60:70] = key[0, 5:15]
    query[0, :10] = key[0, 5:15]
    query[0, 30:40] = key[0, 5:15]
    _, index, valid = check(query, key, **options)
    if "window" not in options:
        assert index[0, :10, 0].tolist() == index[0, 30:40, 0].tolist() == list(range(5, 15))
        if "mutual" in options:
            assert not bool(valid[0, 30:40].any())
    if options == {"mutual": True}:
        assert bool(valid[0, :10].all())


def tensor_core_sum(products, block, bits):
    """Float32 sum of exact ``products``, a block at a time, aligned to the largest and cut off as the hardware may."""
    total = 0.0
    for start in range(0, len(products), block):
        terms = torch.tensor([total, *products[start : start + block]], dtype=torch.float64)
        # The sum of the factors' exponents, which is the product's exponent or one less.
        unit = 2.0 ** (math.floor(math.log2(float(terms.abs().max()))) - bits)
        total = float((terms / unit).trunc().sum() * unit)
        unit = 2.0 ** (math.floor(math.log2(abs(total))) - 23)
        total = math.trunc(total / unit) * unit
    return total


@pytest.mark.parametrize("block", [4, 8, 16])
@pytest.mark.parametrize("channels", [16, 384, 1024])
def test_bound_of_sums_on_tensor_cores(channels, block):
    """Against the coarsest hardware: no bit kept below float32's own."""
    bound = float32.sum_error(channels)
    # One large product, and small ones just below the last bit of the sum.
    worst = torch.full((channels,), 2.0**-11.5 * (1 - 2.0**-10)).half()
    worst[0] = 1
    alternating = worst.clone()
    alternating[1::2] *= -1
    rows = [(worst, worst), (worst, alternating)]
    for _ in range(20):
        query, key = (torch.nn.functional.normalize(torch.randn(channels), dim=0) for _ in range(2))
        rows += [(query.half(), key.half()), (query.half(), query.half())]
    errors = []
    for query, key in rows:
        products = (query.double() * key.double()).tolist()
        errors.append(abs(tensor_core_sum(products, block, 23) - sum(products)))
    assert max(errors) <= bound
    # Not far from it.
    assert errors[0] > (channels - 16) * 2.0**-23 / 1.01


@numeric
def test_mutual_by_halves_of_a_tile(monkeypatch):
    """As on Blackwell."""
    monkeypatch.setattr(launch, "capability", lambda _: (10, 0))
    monkeypatch.setattr(kernel, "default_tile", lambda *_: tiles.Tile(32, 32, 1, 16, 4, 2))
    query, key = sets(75, 90, 12, torch.float16)
    query[0, [5, 40, 70]] = query[0, 20].clone()
    _, _, valid = check(query, key, mutual=True)
    assert not bool(valid[0, [20, 40, 70]].any())


@numeric
@pytest.mark.parametrize("k", [1, 3])
def test_few_queries_that_float16_leaves_open_are_searched_by_many_blocks(k, monkeypatch):
    """Two flat queries among others: their one tile's keys are cut into parts."""
    monkeypatch.setattr(nearest_gpu, "_SMALL", 0)
    monkeypatch.setattr(float32, "MOST_BLOCKS", 6)
    counts = []
    search = kernel.search

    def spoil(*arguments, chosen):
        found = search(*arguments, chosen=chosen)
        counts.append(int(chosen[1]))
        # Lists that no block has written hold values better than any match.
        found.values.nan_to_num_(nan=9.0)
        return found

    monkeypatch.setattr(kernel, "search", spoil)
    query, key = sets(260, 700, 16)
    query[0, [7, 200]] = 1
    key[0, :400] = 1 + 0.01 * key[0, :400]
    key[0, [37, 399]] = 1
    _, index, _ = check(query, key, k=k)
    assert 2 <= counts[0] <= 64
    assert index[0, [7, 200], 0].tolist() == [37, 37]


@numeric
def test_fast_compares_in_half_precision():
    check(*sets(9, 140, 24), fast=True, tie=2**-9)


@numeric
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rules(search, dtype, monkeypatch):
    """Ties go to the lowest index; rows with NaN or infinity take no part; zero rows have similarity 0."""
    monkeypatch.setattr(nearest_gpu, "_SMALL", 0 if search else 1 << 60)
    query, key = sets(9, 70, 16, dtype)
    key[0, 40:] = key[0, :30]
    query[0, :5] = key[0, [3, 50, 69, 12, 12]]
    query[0, 5, 2] = torch.nan
    query[0, 6] = 0
    key[0, 3, 0] = torch.inf
    key[0, 12] = -key[0, 12]
    similarity, index, valid = check(
        query, key, k=2, mutual=True, stream=STREAMS[0] if search and dtype != torch.float32 else None
    )
    # The duplicates of rows that take part: the lower one, then the higher.
    assert index[0, 1].tolist() == [10, 50]
    assert index[0, 2].tolist() == [29, 69]
    assert similarity[0, 1, 0] == similarity[0, 1, 1]
    assert index[0, 0, 0] == 43
    # Two equal queries: the first is the key's own best.
    assert index[0, 3, 0] == index[0, 4, 0] == 52
    assert (bool(valid[0, 3]), bool(valid[0, 4])) == (True, False)
    assert index[0, 5].tolist() == [-1, -1]
    assert not bool(valid[0, 5])
    assert similarity[0, 6].tolist() == [0.0, 0.0]
    assert index[0, 6].tolist() == [0, 1]


@numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stream", [True, False])
def test_flat_sets(dtype, stream, monkeypatch):
    monkeypatch.setattr(nearest_gpu, "_SMALL", 0)
    query = torch.ones(1, 5, 7, dtype=dtype)
    similarity, index, valid = run(
        query,
        torch.ones(1, 150, 7, dtype=dtype),
        k=2,
        mutual=True,
        stream=STREAMS[0] if stream and dtype != torch.float32 else None,
    )
    assert index[0].tolist() == [[0, 1]] * 5
    assert valid[0].tolist() == [True, False, False, False, False]
    torch.testing.assert_close(similarity, torch.ones_like(similarity))


@numeric
def test_range():
    """Norms whose squares leave the range of float32, and products that overflow."""
    query, key = sets(6, 40, 8)
    query[0, 0] *= 1e30
    query[0, 1] *= 1e-30
    key[0, :10] *= 1e35
    key[0, 10:20] *= 1e-9
    check(query, key)
    _, index, _ = run(query[:, :1], key, normalize=False)
    table = similarities(query[:, :1].double(), key, normalize=False)[0, 0]
    table[table.abs() > 3e38] = -torch.inf
    assert int(index[0, 0, 0]) == int(table.argmax())


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("channels", [1, 33, 384])
@pytest.mark.parametrize(("places", "both"), [(1, False), (1, True), (2, True), (32, False)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_default_tiles_fit(capability, channels, places, both, itemsize):
    for window in (False, True):
        tile = kernel.default_tile(channels, itemsize, places, both, window, capability)
        staged = (tile.rows + tile.columns) * tile.depth * itemsize * tile.stages
        assert staged <= tiles.shared_memory(capability)
        assert tile.depth >= 16
    assert all(
        (t.rows + t.columns) * t.depth * 2 * t.stages <= tiles.shared_memory(capability)
        for t in kernel.candidates(channels, capability)
    )


def test_what_it_leaves_to_the_plain_version(monkeypatch):
    query, key = sets(3, 4, 2)
    assert "k must be at most 32" in nearest_gpu.fits(query, key, 33, None)[1]
    assert "float64" in nearest_gpu.fits(query.double(), key.double(), 1, None)[1]
    assert not nearest_gpu.fits(query[:, :0], key, 1, None)[0]
    assert not nearest_gpu.fits(query[..., :0], key[..., :0], 1, None)[0]
    assert not nearest_gpu.fits(query, key, 1, [1, 1, 3, 1, 1 << 20])[0]
    assert "not on a CUDA device" in nearest_gpu.can_run(query, key, 1, None)[1]
    monkeypatch.setenv("LIFT_FAST_DISABLE_TRITON", "1")
    result = nearest(query.to(DEVICE), key.to(DEVICE))
    assert torch.equal(result.index.cpu(), nearest_by(plain.search, query, key, 1, False, None, None, True)[1])


@pytest.mark.parametrize("stream", STREAMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("n", "m", "channels", "options"),
    [
        (1, 1, 1, {"mutual": True}),
        (7, 300, 33, {"mutual": True}),
        (45, 190, 12, {"mutual": True, "ratio": 0.98}),
        (5, 97, 8, {"k": 2, "normalize": False}),
        (3, 257, 16, {"normalize": False, "mutual": True}),
        (31, 2, 3, {"k": 2, "mutual": True}),
    ],
    ids=str,
)
def test_streams_against_brute_force(n, m, channels, options, dtype, stream):
    needs_feed(stream)
    check(*sets(n, m, channels, dtype, batch=2), **options, stream=stream)


@pytest.mark.parametrize("stream", STREAMS, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("options", [{"mutual": True}, {"mutual": True, "ratio": 0.98}, {"k": 2}], ids=str)
def test_equal_keys_in_groups_classes_tiles_and_splits(options, splits, stream, monkeypatch):
    needs_feed(stream)
    monkeypatch.setattr(groups, "_splits", lambda *_: splits)
    query, key = sets(45, 450, 24, torch.float16)
    # In the group of key 5, its class, another class, and other tiles.
    copies = [13, 21, 69, 133, 66, 200, 391, 449]
    key[0, copies] = key[0, 5].clone()
    key[0, [300, 302]] = key[0, 140].clone()
    query[0, [3, 20, 44]] = key[0, 5]
    query[0, 7] = key[0, 140]
    _, index, valid = check(query, key, **options, stream=stream)
    assert index[0, [3, 20, 44], 0].tolist() == [5, 5, 5]
    assert index[0, 7, 0] == 140
    if "k" in options:
        assert index[0, [3, 20, 44], 1].tolist() == [13, 13, 13]
        assert index[0, 7, 1] == 300
    if options == {"mutual": True}:
        assert valid[0, [3, 20, 44]].tolist() == [True, False, False]


def test_resolving_groups_of_tiles_whose_parts_have_their_own_classes():
    """The results of :mod:`lift_fast.kernels.nearest_pingpong`, which no interpreter runs."""
    query, key = sets(19, 700, 40, torch.float16, batch=2)
    key[0, [9, 130, 650]] = key[0, 77].clone()
    query[0, 3] = key[0, 77]
    rows, keys = (nearest_rows.prepare(part.to(DEVICE), True, torch.float16) for part in (query, key))
    table = torch.full((2, 19, 768), -torch.inf)
    table[:, :, :700] = similarities(query, key)
    # Tiles, parts of 64, members, classes.
    most = table.unflatten(2, (3, 4, 8, 8)).amax(4)
    values, numbers = most.max(2)
    found = groups.Groups(
        values.flatten(2)[:, None].float().contiguous().to(DEVICE),
        numbers.flatten(2)[:, None].int().contiguous().to(DEVICE),
        1,
        None,
    )
    similarity = torch.empty(2, 19, 1, device=DEVICE)
    index = torch.empty(2, 19, 1, dtype=torch.int64, device=DEVICE)
    groups.resolve(rows, keys, found, similarity, index)
    assert torch.equal(index[:, :, 0].cpu(), table.argmax(2))
    assert index[0, 3, 0] == 9
    torch.testing.assert_close(similarity[:, :, 0].cpu().double(), table.amax(2).double(), atol=TIE, rtol=0)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("channels", [1, 33, 384, 768, 4096])
def test_streams_fit(capability, channels):
    for mutual in (False, True):
        streams = [groups.default_stream(channels, capability, 1, mutual, feed) for feed in ("tma", "warp")]
        streams += groups.candidates(channels, capability, mutual).values()
        for stream in streams:
            tile = stream.tile
            staged = tile.columns * tile.depth * 2 * tile.stages
            resident = -(-channels // tile.depth) * tile.depth if stream.feed == "warp" else tile.depth * tile.stages
            assert staged + tile.rows * resident * 2 < tiles.shared_memory(capability)
            assert stream.feed == "threads" or capability >= (9, 0)
            assert stream.feed != "warp" or capability < (10, 0)
    assert groups.default_stream(384, (9, 0), 1, True, "warp").feed == "warp"
    assert groups.default_stream(384, (9, 0), 2, True, "warp").feed == "tma"
    assert groups.default_stream(768, (9, 0), 1, True, "warp").feed == "tma"


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_streams_leave_out_what_is_not_finite(stream):
    needs_feed(stream)
    query, key = sets(20, 70, 16, torch.float16)
    key[0, 64:] = torch.nan
    key[0, ::3, 2] = -torch.inf
    query[0, 4, 0] = torch.inf
    query[0, 6] = 0
    similarity, index, _ = check(query, key, k=2, mutual=True, stream=stream)
    assert index[0, 4].tolist() == [-1, -1]
    assert index[0, 6].tolist() == [1, 2]
    assert similarity[0, 6].tolist() == [0.0, 0.0]
    _, index, valid = run(query, torch.full_like(key, torch.nan), mutual=True, stream=stream)
    assert not bool((index >= 0).any() | valid.any())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("options", [{}, {"mutual": True}, {"ratio": 0.95, "mutual": True}, {"k": 5}], ids=str)
    @pytest.mark.parametrize("shape", [(1031, 3137, 384), (3001, 64, 193), (257, 20011, 768)])
    def test_large(self, shape, options, dtype):
        check(*sets(*shape, dtype), **options)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_large_window(self, dtype):
        check(*sets(56 * 56, 3 * 56 * 56, 64, dtype), k=5, window=[12, 56, 56, 56, 56], mutual=True)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_large_flat(self, dtype):
        query = torch.ones(1, 5000, 32, dtype=dtype)
        _, index, valid = run(query, query, mutual=True)
        assert int(index.abs().max()) == 0
        assert valid[0].nonzero().tolist() == [[0]]

    @pytest.mark.parametrize("mutual", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    @pytest.mark.parametrize("shape", [(1031, 3137, 384), (3001, 64, 193), (5000, 20011, 64)])
    def test_every_stream(self, shape, dtype, mutual):
        query, key = sets(*shape, dtype)
        key[0, 50:60] = key[0, 5:15]
        query[0, 20:30] = key[0, 5:15]
        query[0, 900:910] = key[0, 5:15]
        query[0, 700], key[0, 61, 0] = 0, torch.nan
        for stream in groups.candidates(shape[2], torch.cuda.get_device_capability(), mutual).values():
            first = check(query, key, mutual=mutual, stream=stream)
            assert first[1][0, 20:30, 0].tolist() == first[1][0, 900:910, 0].tolist() == list(range(5, 15))
            assert not mutual or not bool(first[2][0, 900:910].any())
            again = run(query, key, mutual=mutual, stream=stream)
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))

    def test_captured(self):
        """No step waits for the host."""
        query, key = (part[0].to(DEVICE) for part in sets(3000, 3500, 64))
        expected = nearest(query, key, mutual=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = nearest(query, key, mutual=True)
        graph.replay()
        for one, other in zip(captured, expected, strict=True):
            assert torch.equal(one, other)
