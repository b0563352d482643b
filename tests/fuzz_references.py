"""References of :mod:`fuzz`: float64, written from the documentation, with the allowed rounding."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


class Wrong(AssertionError):
    """A result that is not the documented one."""


def expect(condition: object, what: str) -> None:
    """Raise :class:`Wrong` if ``condition`` is false."""
    if not bool(condition):
        raise Wrong(what)


def in_range(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Finite rows of float64 numbers times a power of two that makes the largest about one."""
    finite = rows.nan_to_num(0, 0, 0).abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    exponent = max(-1000, min(1000, math.frexp(largest)[1])) if largest else 0
    return rows * 2.0**-exponent, exponent


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Divided by max(norm, 1e-12)."""
    largest = rows.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True) if rows.shape[-1] else rows.sum(-1, keepdim=True)
    scaled = rows / largest.where(largest > 0, 1)
    norm = scaled.square().sum(-1, keepdim=True).sqrt()
    long = norm * largest >= 1e-12
    return torch.where(long, scaled / norm.where(norm > 0, 1), rows * 1e12)


def window_mask(window, n: int, m: int) -> torch.Tensor:
    """Which pairs lie in the window, in integers."""
    radius, (qh, qw), key_grid = window
    kh, kw = key_grid or (qh, qw)
    mask = torch.zeros(n, m, dtype=torch.bool)
    for i in range(n):
        for j in range(m):
            y, x = divmod(j % (kh * kw), kw)
            v, u = divmod(i, qw)
            near_y = abs((2 * y + 1) * qh - (2 * v + 1) * kh) <= 2 * radius * qh
            near_x = abs((2 * x + 1) * qw - (2 * u + 1) * kw) <= 2 * radius * qw
            mask[i, j] = near_y and near_x
    return mask


def similarities(query: torch.Tensor, key: torch.Tensor, normalize: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """[N, M] float64 (times 2 to the last), their rounding in units of float32's, the exponent."""
    query, key = query.double(), key.double()
    if normalize:
        query, key = unit(query), unit(key)
        lengths = torch.ones(len(query), len(key), dtype=torch.float64)
        return query @ key.T, lengths, 0
    (query, e), (key, f) = in_range(query), in_range(key)
    lengths = query.square().sum(-1, keepdim=True).sqrt() * key.square().sum(-1).sqrt()
    return query @ key.T, lengths, e + f


def check_nearest(query, key, options, result, tolerance: float, wide: torch.dtype, bitwise: bool) -> None:
    """One pair of sets, ``query [N, C]`` and ``key [M, C]``; with ``bitwise`` equal rows have equal similarities."""
    similarity, index, valid = result
    n, m, k = len(query), len(key), options["k"]
    table, lengths, exponent = similarities(query, key, options["normalize"])
    rounding = tolerance * lengths.nan_to_num(0, 0, 0)
    if tolerance > 1e-3 and m:
        # The fast search rounds on the scale of the longest query and key, less their centres.
        rounding = rounding.max().expand_as(rounding)
    good_q, good_k = query.isfinite().all(-1), key.isfinite().all(-1)
    allowed = good_q[:, None] & good_k[None]
    if options["window"] is not None:
        allowed &= window_mask(options["window"], n, m)
    expect(similarity.dtype == wide and index.dtype == torch.int64 and valid.dtype == torch.bool, "dtypes")
    expect(similarity.shape == (n, k) and index.shape == (n, k) and valid.shape == (n,), "shapes")
    exact_bits = key.double().tolist()
    for i in range(n):
        count = min(k, int(allowed[i].sum()))
        chosen = index[i, :count]
        expect((index[i, count:] == -1).all() and (similarity[i, count:] == -torch.inf).all(), f"row {i}: rest")
        if not count:
            expect(not valid[i], f"row {i}: valid without a match")
            continue
        expect(((chosen >= 0) & (chosen < m)).all(), f"row {i}: index {chosen.tolist()}")
        expect(len(set(chosen.tolist())) == count and allowed[i][chosen].all(), f"row {i}: {chosen.tolist()}")
        row = torch.where(allowed[i], table[i], -torch.inf)
        order = row.sort(descending=True).values[:count]
        slack = rounding[i].max()
        expect(
            ((row[chosen] - order).abs() <= 2 * slack).all(), f"row {i}: {row[chosen].tolist()} for {order.tolist()}"
        )
        half = exponent // 2
        true = row[chosen] * 2.0**half * 2.0 ** (exponent - half)
        error = rounding[i][chosen] * 2.0**half * 2.0 ** (exponent - half)
        limit = torch.finfo(wide).max
        shown = similarity[i, :count].double()
        close = (shown - true).abs() <= error + 1e-44
        over = (true.abs() + error >= limit) & (shown.abs() == torch.inf) & (shown.sign() == true.sign())
        expect((close | over).all(), f"row {i}: similarity {shown.tolist()} for {true.tolist()}")
        first = int(chosen[0])
        same = [j for j in range(m) if allowed[i, j] and exact_bits[j] == exact_bits[first]]
        expect(not bitwise or same[0] == first, f"row {i}: key {first} though its equal {same[0]} comes first")
        agreed: bool | None = True
        if options["mutual"]:
            column = torch.where(allowed[:, first], table[:, first], -torch.inf)
            best = column.max()
            near = (column >= best - 2 * rounding[:, first].max()).nonzero().flatten().tolist()
            if len(near) == 1:
                agreed = near[0] == i
            elif i not in near:
                agreed = False
            else:
                rows = {tuple(query[j].tolist()) for j in near}
                agreed = (near[0] == i) if len(rows) == 1 and bitwise else None
        if options["ratio"] is not None and agreed:
            runner = float(row.sort(descending=True).values[1]) if int(allowed[i].sum()) > 1 else -math.inf
            margin = options["ratio"] ** 2 * (1 - runner) - (1 - float(row[allowed[i]].max()))
            agreed = None if abs(margin) <= 4 * slack else margin > 0
        if agreed is not None:
            expect(bool(valid[i]) == agreed, f"row {i}: valid {bool(valid[i])}")


def axis_weights(cells: int, pixels: int) -> torch.Tensor:
    """[pixels, cells] of bilinear interpolation, align_corners=False, in integers, so zero weights are exact."""
    weights = torch.zeros(pixels, cells, dtype=torch.float64)
    for p in range(pixels):
        # Twice the number of pixels times the position in cells.
        at = min(max((2 * p + 1) * cells - pixels, 0), 2 * pixels * (cells - 1))
        low, rest = divmod(at, 2 * pixels)
        weights[p, low] += 1 - rest / (2 * pixels)
        if rest:
            weights[p, low + 1] += rest / (2 * pixels)
    return weights


def pixel_descriptors(cells: torch.Tensor, size, normalize) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Of ``cells [C, h, w]``: descriptors [H * W, C] (times 2 to the last), whether each is finite, their rounding."""
    _, h, w = cells.shape
    rows = cells.double().flatten(1).T
    good = rows.isfinite().all(-1)
    exponent = 0
    if normalize == "grid":
        rows = unit(rows)
    else:
        rows, exponent = in_range(rows)
    weights = torch.einsum("ya,xb->yxab", axis_weights(h, size[0]), axis_weights(w, size[1])).reshape(-1, h * w)
    part = ((weights > 0) & ~good).sum(1) == 0
    rows = rows.where(good[:, None], 0)
    wide, scale = weights @ rows, ((weights > 0) * rows.square().sum(1).sqrt()).amax(1)
    if normalize == "pixel":
        norm = wide.square().sum(1, keepdim=True).sqrt()
        floor = 1e-12 * 2.0**-exponent
        norm = norm.clamp_min(max(floor, 1e-300))
        wide, scale, exponent = wide / norm, scale / norm[:, 0], 0
    return wide, part, scale, exponent


def check_dense(query, key, query_size, key_size, points, options, result, tolerance, wide) -> None:
    """One pair of maps."""
    similarity, xy, valid = result
    q, q_part, q_scale, e = pixel_descriptors(query, query_size, options["normalize"])
    k, k_part, k_scale, f = pixel_descriptors(key, key_size, options["normalize"])
    table, rounding = q @ k.T, tolerance * q_scale[:, None] * k_scale
    table = table.masked_fill(~(q_part[:, None] & k_part), -torch.inf)
    exponent = e + f
    pixels = range(len(q)) if points is None else [int(y) * query_size[1] + int(x) for x, y in points.floor().tolist()]
    expect(similarity.shape == (len(pixels),) and xy.shape == (len(pixels), 2), "shapes")
    expect(similarity.dtype == wide and xy.dtype == torch.int64 and valid.dtype == torch.bool, "dtypes")
    for at, pixel in enumerate(pixels):
        row = table[pixel]
        if not bool((row > -torch.inf).any()):
            expect(
                xy[at].tolist() == [-1, -1] and similarity[at] == -torch.inf and not valid[at], f"pixel {pixel}: none"
            )
            continue
        x, y = xy[at].tolist()
        expect(0 <= x < key_size[1] and 0 <= y < key_size[0], f"pixel {pixel}: xy {[x, y]}")
        found = y * key_size[1] + x
        slack = float(rounding[pixel].where(k_part, 0).max())
        expect(row[found] >= row.max() - 2 * slack, f"pixel {pixel}: {float(row[found])} for {float(row.max())}")
        half = exponent // 2
        true, error = (float(part) * 2.0**half * 2.0 ** (exponent - half) for part in (row[found], slack))
        shown, limit = float(similarity[at]), torch.finfo(wide).max
        over = abs(true) + error >= limit and math.isinf(shown) and (shown > 0) == (true > 0)
        expect(abs(shown - true) <= error + 1e-44 or over, f"pixel {pixel}: similarity {shown} for {true}")
        agreed: bool | None = True
        if options["mutual"]:
            column, best = table[:, found], table[:, found].max()
            near = (column >= best - 2 * rounding[:, found].where(q_part, 0).max()).nonzero().flatten().tolist()
            agreed = False if pixel not in near else True if len(near) == 1 else None
        if agreed is not None:
            expect(bool(valid[at]) == agreed, f"pixel {pixel}: valid {bool(valid[at])}")


def reference_loss(prediction, target, dim: int):
    """Loss and slope at each position in float64, [..] without ``dim``, and the prediction's length."""
    x, y = prediction.double().movedim(dim, -1), target.double().movedim(dim, -1)

    def measured(rows):
        largest = (
            rows.nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True) if rows.shape[-1] else rows.sum(-1, keepdim=True)
        )
        factor = torch.where(largest > 1e100, 2.0 ** -torch.frexp(largest)[1].double(), torch.ones_like(largest))
        rows = rows * factor
        return rows, (rows.square().sum(-1, keepdim=True) + 9.999999960041972e-13 * factor.square()).sqrt(), factor

    (x, own, factor), (y, other, _) = measured(x), measured(y)
    cosine = (x * y).sum(-1, keepdim=True) / own / other
    slope = (cosine * x / own - y / other) / own * factor
    return (1 - cosine)[..., 0], slope.movedim(-1, dim), (own / factor)[..., 0]


def functional_lift(state, imgs, x, patch: int):
    """LiFT as in the paper's table; ``imgs`` are whole patches, ``x`` is [B, C, h, w]."""

    def norm_relu(y, name):
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale = state[f"{name}.weight"] / (variance + 1e-5).sqrt()
        return F.relu((y - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + state[f"{name}.bias"].view(1, -1, 1, 1))

    def conv(y, name, **options):
        return F.conv2d(y, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)

    parts, skip = [x], []
    if "image_convs_1.0.weight" in state:
        f = imgs
        blocks = sum(name.startswith("image_convs_1.") and name.endswith("running_mean") for name in state)
        for block in range(blocks):
            stride = 2 if block < 2 else 1
            f = conv(f, f"image_convs_1.{3 * block}", stride=stride, padding=1)
            f = norm_relu(f, f"image_convs_1.{3 * block + 1}")
        f = f if patch == 8 else F.max_pool2d(f, 2)
        parts.append(norm_relu(conv(f, "image_convs_2.0", stride=2, padding=1), "image_convs_2.1"))
        skip = [f]
    up = F.conv_transpose2d(torch.cat(parts, 1), state["up1.up.weight"], state["up1.up.bias"], stride=2)
    y = torch.cat([up, *skip], 1)
    for conv_at, norm_at in ((0, 1), (3, 4)):
        y = norm_relu(conv(y, f"up1.conv_1.double_conv.{conv_at}", padding=1), f"up1.conv_1.double_conv.{norm_at}")
    return conv(y, "outc")
