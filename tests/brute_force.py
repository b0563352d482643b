"""The brute force of matching in float64: unit vectors, pairs of a window, similarities of all pixels."""

import torch
from torch.nn import functional as F

# Similarities of unit vectors that differ by less may tie in float32.
TIE = 1e-6


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def in_window(window, n, m):
    """[n, m] bool: distance of cell centres, measured in cells of the key grid.

    Args:
        window: (radius, query_h, query_w, key_h, key_w); the keys may be several grids one after the other.
    """
    radius, qh, qw, kh, kw = window
    query, key = torch.arange(n) % (qh * qw), torch.arange(m) % (kh * kw)
    # Fractions of small integers stay exact enough in float64 for the comparison below.
    dy = (key // kw + 0.5)[None].double() - (query // qw + 0.5)[:, None].double() * (kh / qh)
    dx = (key % kw + 0.5)[None].double() - (query % qw + 0.5)[:, None].double() * (kw / qw)
    return torch.maximum(dy.abs(), dx.abs()) <= radius + 1e-9


def pixel_similarities(query_map, key_map, query_size, key_size, normalize):
    """Similarities in float64 and how far each may be off in float32: both [query pixels, key pixels]."""

    def descriptors(cells, size):
        cells = cells.double()
        # What is not finite spoils the pixels in which it has weight.
        bad = ~torch.isfinite(cells).all(0, keepdim=True)
        cells = torch.where(bad, 0.0, cells)
        if normalize == "grid":
            cells = cells / cells.norm(dim=0, keepdim=True).clamp_min(1e-12)
        # Rounding is on the scale of the longest cell around, divided by the norm where cells nearly cancel.
        longest = F.max_pool2d(cells.norm(dim=0, keepdim=True), 3, stride=1, padding=1)
        wide, scale, spoiled = (
            F.interpolate(part[None], size=size, mode="bilinear", align_corners=False)[0].flatten(1).T
            for part in (cells, longest, bad.double())
        )
        wide = torch.where(spoiled > 1e-9, torch.nan, wide)
        if normalize == "pixel":
            norm = wide.norm(dim=1, keepdim=True).clamp_min(1e-12)
            wide, scale = wide / norm, scale / norm
        return wide, scale.clamp_min(1.0)

    (query, query_scale), (key, key_scale) = descriptors(query_map, query_size), descriptors(key_map, key_size)
    values = query @ key.T
    return values.masked_fill(~torch.isfinite(values), -torch.inf), (TIE * query_scale * key_scale.T).nan_to_num(0.0)


DEGENERATE = [
    "nearly flat",
    "flat but for rounding",
    "repeated",
    "one direction",
    "zeros",
    "opposite",
    "of every length",
    "smooth",
]


def degenerate_cells(kind, generator, cells, channels):
    """Descriptors whose patches span fewer than four directions, or four that are nearly the same."""
    rows = torch.randn(cells, channels, generator=generator)
    if kind == "nearly flat":
        return rows[:1] + 1e-3 * rows
    if kind == "flat but for rounding":
        return (rows[:1] + 1e-7 * rows).expand(cells, channels)
    if kind == "repeated":
        return rows[torch.randint(3, (cells,), generator=generator)]
    if kind == "one direction":
        return torch.randn(cells, 1, generator=generator) * rows[:1]
    if kind == "zeros":
        return rows * (torch.rand(cells, 1, generator=generator) < 0.5)
    if kind == "opposite":
        return rows[:1] * (1 - 2 * (torch.arange(cells)[:, None] % 2)) + 1e-3 * rows
    if kind == "smooth":
        return F.interpolate(rows[:3].T[None], size=cells, mode="linear")[0].T
    return rows * torch.logspace(-3, 3, cells)[:, None]


def degenerate_map(kind, seed, channels, h, w):
    """[channels, h, w] of :func:`degenerate_cells`."""
    rows = degenerate_cells(kind, torch.Generator().manual_seed(seed), h * w, channels)
    return rows.t().unflatten(1, (h, w)).contiguous()


def check_spans(spans, image):
    """That random vectors' projections onto each patch of ``image`` have the lengths that ``spans [patches, 16]`` say.

    Its corners must be independent.
    """
    (y, x), width = image.strips(), image.grid[1]
    tokens = image.tokens.double()
    assert spans.shape == (y.count * x.count, 16)
    row, column = torch.tril_indices(4, 4)
    for patch, numbers in enumerate(spans):
        rows, columns = ((axis.low[i], axis.high[i]) for axis, i in zip((y, x), divmod(patch, x.count), strict=True))
        a, b, d, e = (tokens[r * width + c] for r in rows for c in columns)
        basis = torch.stack([a, b - a, d - a, (e - d) - (b - a)])
        inverse = torch.zeros(4, 4, dtype=torch.float64)
        inverse[row, column] = numbers[:10].double()
        query = torch.randn(5, tokens.shape[1], dtype=torch.float64)
        query[0] = e
        # A border has fewer directions.
        expected = (torch.linalg.pinv(basis, rtol=1e-9) @ basis @ query.T).norm(dim=0)
        bound = (inverse @ (basis @ query.T)).norm(dim=0)
        torch.testing.assert_close(bound, expected, rtol=1e-4, atol=1e-4)
        assert bool((bound >= expected * (1 - 1e-9)).all())


def check_projections(run, kernels, monkeypatch, cells, sizes, points):
    """Without the spans of ``kernels`` a search visits all that its range leaves, and finds the same bit for bit."""
    ours = run(*cells, *sizes, "pixel"), run(*cells, *sizes, "pixel", points)
    assert bool((ours[0][1] >= 0).all())
    spans = kernels.spans
    monkeypatch.setattr(kernels, "spans", lambda *arguments: spans(*arguments).fill_(torch.nan))
    for some, every in zip(ours, (run(*cells, *sizes, "pixel"), run(*cells, *sizes, "pixel", points)), strict=True):
        for part, expected in zip(some, every, strict=True):
            assert torch.equal(part, expected)
