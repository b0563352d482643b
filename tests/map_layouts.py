"""A map's cells in every order and stride of memory."""

import torch


def laid_out(cells):
    """The same cells in every layout of a map."""
    n, c = cells.shape
    framed = torch.full((n + 5, c + 3), torch.nan)
    framed[2 : n + 2, 1 : c + 1] = cells
    turned = torch.full((c + 3, n + 5), torch.nan)
    turned[1 : c + 1, 2 : n + 2] = cells.t()
    yield from (cells, cells.t().contiguous().t(), framed[2 : n + 2, 1 : c + 1], turned[1 : c + 1, 2 : n + 2].t())
    yield cells[:, None].expand(n, 2, c).flatten(1)[:, :c]
