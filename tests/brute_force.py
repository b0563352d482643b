"""What every brute force of matching begins with: unit vectors, and which pairs a window holds."""

import torch


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
