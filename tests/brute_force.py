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
