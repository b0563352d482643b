"""``nearest`` against what people write today: normalise, multiply, take the maximum. Width 384, up to 56 x 56."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lift_fast import nearest


@pytest.mark.parametrize("side", [28, 56])
def test_nearest(benchmark, compare, device, side):
    benchmark.group = f"nearest, {device}, {side * side} x {side * side}, C 384, float32"
    query, key = torch.randn(2, side * side, 384, device=device)

    def plain():
        return (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T).max(dim=-1)

    error = float((nearest(query, key).similarity[:, 0] - plain().values).abs().max())
    compare(lambda: nearest(query, key), plain, error=error, limit=1e-5)
