"""``cosine_loss`` forward and backward against ``CosineEmbeddingLoss`` on permuted copies, the usual code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lift_fast import cosine_loss
from lift_fast.testing import relative_error

SHAPE = (8, 384, 28, 28)
# For loss and gradient together; in bfloat16 the gradient's own rounding.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def embedding_loss(prediction, target):
    """NCHW maps as rows of channels."""
    channels = prediction.shape[1]
    rows = [t.permute(0, 2, 3, 1).reshape(-1, channels) for t in (prediction, target)]
    return nn.functional.cosine_embedding_loss(*rows, torch.ones(len(rows[0]), device=prediction.device))


def forward_and_backward(function, prediction, target):
    prediction.grad = None
    loss = function(prediction, target)
    loss.backward()
    return torch.cat([loss.detach().float().view(1), prediction.grad.float().flatten() * prediction.numel()])


def run(function, prediction, target):
    prediction.grad = None
    function(prediction, target).backward()


@pytest.fixture
def maps(device):
    torch.manual_seed(0)
    return torch.randn(SHAPE, device=device), torch.randn(SHAPE, device=device)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss(benchmark, compare, maps, device, dtype, layout):
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"cosine loss forward + backward, {device}, {list(SHAPE)}, {layout}"
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, y = (t.to(dtype).contiguous(memory_format=memory) for t in maps)
    x.requires_grad_()
    exact = forward_and_backward(embedding_loss, x.detach().float().requires_grad_(), y.float())
    error = relative_error(forward_and_backward(cosine_loss, x, y), exact)
    compare(
        lambda: run(cosine_loss, x, y),
        lambda: run(embedding_loss, x, y),
        error=error,
        limit=LIMITS[dtype],
        name=f"lift_fast {name}",
    )


def test_compiled(benchmark, compare, maps, device):
    """An alternative for users, on the same scale."""
    benchmark.group = f"cosine loss forward + backward, {device}, {list(SHAPE)}, NCHW"
    x, y = maps[0].requires_grad_(), maps[1]
    torch._dynamo.reset()
    compiled = torch.compile(embedding_loss, dynamic=False)
    error = relative_error(forward_and_backward(compiled, x, y), forward_and_backward(embedding_loss, x, y))
    compare(
        lambda: run(compiled, x, y),
        lambda: run(embedding_loss, x, y),
        error=error,
        limit=1e-5,
        name="plain float32 compiled",
    )
