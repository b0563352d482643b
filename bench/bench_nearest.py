"""``nearest`` against the usual code: normalise, multiply in chunks, take the maximum. Width 384.

The alternatives are the same code in bfloat16 or compiled, faiss, KeOps, and kornia for mutual matches. Packages that
are not installed (``pip install '.[peers]'``) are skipped.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lift_fast import nearest

SIDES = [28, 56, 112]
# Queries of a chunk; its similarities to 12,544 keys are 49 MiB.
CHUNK = 1024


def descriptors(side, device):
    torch.manual_seed(side)
    return torch.randn(2, side * side, 384, device=device)


def chunked(query, key):
    """The largest cosine of each query and its index."""
    key = F.normalize(key, dim=-1).T
    parts = [(F.normalize(chunk, dim=-1) @ key).max(dim=-1) for chunk in query.split(CHUNK)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def group(side, device, what="nearest"):
    return f"{what}, {device}, {side * side} x {side * side}, C 384, float32"


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("side", SIDES)
def test_nearest(benchmark, compare, device, side, precision):
    benchmark.group = group(side, device)
    query, key = descriptors(side, device)
    similarity = nearest(query, key, precision=precision).similarity[:, 0]
    error = float((similarity - chunked(query, key)[0]).abs().max())
    compare(
        lambda: nearest(query, key, precision=precision),
        lambda: chunked(query, key),
        error=error,
        limit=1e-5 if precision == "exact" else 2**-7,
        name=f"lift_fast {precision}",
    )


def bfloat16(device):
    return lambda query, key: chunked(query.bfloat16(), key.bfloat16())


def compiled(device):
    torch._dynamo.reset()
    return torch.compile(chunked, dynamic=False)


def faiss_flat(device):
    faiss = pytest.importorskip("faiss")
    if device != "cpu":
        pytest.skip("faiss-cpu holds no GPU kernels")
    faiss.omp_set_num_threads(torch.get_num_threads())

    def run(query, key):
        index = faiss.IndexFlatIP(key.shape[1])
        index.add(F.normalize(key, dim=-1).numpy())
        similarity, found = index.search(F.normalize(query, dim=-1).numpy(), 1)
        return torch.from_numpy(similarity[:, 0]), torch.from_numpy(found[:, 0])

    return run


def keops(device):
    lazy = pytest.importorskip("pykeops.torch").LazyTensor

    def run(query, key):
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        value, index = (-(lazy(query[:, None]) | lazy(key[None]))).min_argmin(dim=1)
        return -value[:, 0], index[:, 0]

    return run


OTHERS = {
    "plain bfloat16": (bfloat16, 2e-2, SIDES),
    "plain compiled": (compiled, 1e-5, SIDES),
    "faiss IndexFlatIP": (faiss_flat, 1e-5, SIDES),
    # KeOps is not made for vectors of 384 channels: 20 s at 3136 rows on two CPU cores.
    "KeOps": (keops, 1e-5, SIDES[:1]),
}


@pytest.mark.parametrize(
    ("side", "variant"), [(side, name) for name, (_, _, sides) in OTHERS.items() for side in sides], ids=str
)
def test_other_ways(benchmark, compare, device, side, variant):
    benchmark.group = group(side, device)
    query, key = descriptors(side, device)
    make, limit, _ = OTHERS[variant]
    other = make(device)
    error = float((other(query, key)[0].float() - chunked(query, key)[0]).abs().max())
    compare(lambda: other(query, key), lambda: chunked(query, key), error=error, limit=limit)


def mutual_matches(query, key):
    """Pairs of rows that are each other's best, [matches, 2]."""
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    table = query @ key.T
    there, back = table.argmax(1), table.argmax(0)
    rows = torch.arange(len(there), device=there.device)
    mutual = back[there] == rows
    return torch.stack([rows[mutual], there[mutual]], dim=1)


def our_mutual_matches(query, key):
    result = nearest(query, key, mutual=True)
    rows = result.valid.nonzero()[:, 0]
    return torch.stack([rows, result.index[rows, 0]], dim=1)


def different(ours, theirs, count):
    """Share of rows with different matches; rounding decides a few near ties."""
    ours, theirs = ({tuple(pair) for pair in pairs.tolist()} for pairs in (ours, theirs))
    return len(ours ^ theirs) / count


@pytest.mark.parametrize("variant", ["lift_fast", "kornia match_mnn"])
@pytest.mark.parametrize("side", SIDES[:2])
def test_mutual(benchmark, compare, device, side, variant):
    benchmark.group = group(side, device, "nearest, mutual")
    query, key = descriptors(side, device)
    if variant == "lift_fast":
        other = our_mutual_matches
    else:
        match_mnn = pytest.importorskip("kornia.feature").match_mnn

        def other(query, key):
            return match_mnn(F.normalize(query, dim=-1), F.normalize(key, dim=-1))[1]

    error = different(other(query, key), mutual_matches(query, key), len(query))
    compare(lambda: other(query, key), lambda: mutual_matches(query, key), error=error, limit=5e-3)


@pytest.mark.parametrize("side", SIDES)
def test_mutual_against_one_direction(benchmark, compare, device, side):
    """The cost of the mutual check: 1.00x means none."""
    benchmark.group = f"nearest, mutual against one direction, {device}, {side * side} x {side * side}"
    query, key = descriptors(side, device)
    one, both = nearest(query, key), nearest(query, key, mutual=True)
    error = float((one.index != both.index).float().mean())
    compare(lambda: nearest(query, key, mutual=True), lambda: nearest(query, key), error=error, limit=0.0)
