"""The cosine loss, forward and backward: against ``CosineEmbeddingLoss`` on permuted copies, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.bench_cosine_loss import embedding_loss, forward_and_backward, run
from lift_fast import cosine_loss
from lift_fast.ops import cosine_loss as op
from lift_fast.testing import poisoned_outputs, relative_error

from .clock import milliseconds
from .state import State

Loss = Callable[[Tensor, Tensor], Tensor]

WORK, TINY = (256, 384, 28, 28), (2, 3, 4, 5)
# Tiles cut by every border, channels that are looped over, tokens.
CASES = [(3, 384, 28, 28), (2, 97, 13, 7), (1, 2050, 5, 3), (5, 33, 1, 1), (2, 768, 14, 14)]
# Of a position's gradient, relative to all gradients.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
_COMPILE_SECONDS = 60


def run_section(state: State) -> None:
    """Writes ``cosine loss``: errors, times, bytes per second, peak memory; and judges the goals."""
    results: dict[str, Any] = {"errors": [], "times": []}
    state.results["cosine loss"] = results
    torch.manual_seed(state.seed)
    dtypes = [torch.float32] if state.rehearse else list(LIMITS)
    for shape in [TINY] if state.rehearse else CASES:
        for dtype in dtypes:
            for memory in (torch.contiguous_format, torch.channels_last):
                error = _error(shape, dtype, memory, state.device)
                results["errors"].append({"shape": shape, "dtype": str(dtype), "layout": str(memory), "error": error})
                if not error <= LIMITS[dtype]:
                    state.failures.append(f"cosine loss {shape} {dtype} {memory}: {error:.2e} > {LIMITS[dtype]:.0e}")
    for dtype in dtypes[:2]:
        _time(state, results["times"], dtype)


def _error(shape: tuple[int, ...], dtype: torch.dtype, memory: torch.memory_format, device: torch.device) -> float:
    x, y = (torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory) for _ in range(2))
    with poisoned_outputs():
        loss, gradient = op.cosine_loss_triton(x, y, 1, "sum", True)
    assert gradient is not None
    wanted, slope = op.gradient_plain(x.double(), y.double(), 1, "sum")
    return max(relative_error(loss, wanted), relative_error(gradient, slope))


def _time(state: State, rows: list[dict[str, Any]], dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    shape = TINY if state.rehearse else WORK
    x = torch.randn(shape, device=state.device).to(dtype).requires_grad_()
    y = torch.randn(shape, device=state.device).to(dtype)
    losses: dict[str, Loss] = {f"ours {name}": cosine_loss, f"plain {name}": embedding_loss}
    if not state.rehearse and state.left() > _COMPILE_SECONDS:
        losses[f"plain compiled {name}"] = torch.compile(embedding_loss, dynamic=False)
    for what, loss in losses.items():
        forward_and_backward(loss, x, y)
        x.grad = None
        if state.device.type == "cuda":
            torch.cuda.synchronize(state.device)
            torch.cuda.reset_peak_memory_stats(state.device)
            before = torch.cuda.memory_allocated(state.device)
            run(loss, x, y)
            peak = torch.cuda.max_memory_allocated(state.device) - before
        else:
            peak = None
        time = milliseconds(lambda loss=loss: run(loss, x, y), [()], state.device, seconds=1.0)
        # Two inputs read, one gradient written.
        row = {"what": what, "ms": time, "bytes per second": 3e3 * x.numel() * x.element_size() / time}
        rows.append({**row, "peak bytes": peak, "gradient bytes": x.numel() * x.element_size()})
        print(f"{what:30} {time:9.3f} ms  {row['bytes per second'] / 1e12:.2f} TB/s", flush=True)
        state.write()
    if state.rehearse:
        return
    found = {row["what"]: row for row in rows}
    ours = found[f"ours {name}"]
    ceiling = state.results.get("ceilings", {}).get("copy bytes per second")
    state.goal(
        f"cosine loss {name}, share of the copy bandwidth",
        ours["bytes per second"] / ceiling if ceiling else None,
        0.85,
        at_least=True,
    )
    state.goal(
        f"cosine loss {name} over permuted copies", found[f"plain {name}"]["ms"] / ours["ms"], 6.0, at_least=True
    )
    compiled = found.get(f"plain compiled {name}")
    state.goal(
        f"cosine loss {name} over the compiled form",
        compiled["ms"] / ours["ms"] if compiled else None,
        1.5,
        at_least=True,
    )
    state.goal(
        f"cosine loss {name}, peak memory in gradients",
        ours["peak bytes"] / ours["gradient bytes"],
        1.05,
        at_least=False,
    )
