"""Predictions and goals beside the outcomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from operator import methodcaller
from typing import Any, NamedTuple

from .context import Row


class Figures:
    """The rows of a run by name."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = {row["what"]: row for row in rows}

    def ms(self, what: str) -> float | None:
        return self._rows.get(what, {}).get("ms")

    def us(self, what: str) -> float | None:
        time = self.ms(what)
        return None if time is None else 1e3 * time

    def over(self, slower: str, faster: str) -> float | None:
        """The time of ``slower`` over that of ``faster``."""
        a, b = self.ms(slower), self.ms(faster)
        return None if a is None or b is None else a / b

    def value(self, what: str, key: str) -> float | None:
        return self._rows.get(what, {}).get(key)

    def share(self, what: str, published: float) -> float | None:
        """Share of a published time."""
        time = self.ms(what)
        return None if time is None else time / published

    def of(self, ceiling: str, key: str, what: str) -> float | None:
        """Share of a ceiling: ``key`` is "flops" or "bytes"."""
        row, best = self._rows.get(what, {}), self._rows.get(ceiling, {})
        if key not in row or key not in best:
            return None
        return (row[key] / row["ms"]) / (best[key] / best["ms"])


class Prediction(NamedTuple):
    """One line of the table."""

    what: str
    measure: Callable[[Figures], float | None]
    unit: str
    predicted: str
    """From FLOPs and bytes, before it was measured; see bench/NOTES.md."""
    goal: float | None = None
    at_least: bool = False

    def line(self, figures: Figures) -> dict[str, Any]:
        outcome = self.measure(figures)
        met = None
        if outcome is not None and self.goal is not None:
            met = bool(outcome >= self.goal if self.at_least else outcome <= self.goal)
        sign = "" if self.goal is None else (">= " if self.at_least else "<= ")
        return {
            "what": self.what,
            "predicted": f"{self.predicted} {self.unit}".strip() if self.predicted else "",
            "outcome": outcome,
            "unit": self.unit,
            "goal": None if self.goal is None else f"{sign}{self.goal:g}",
            "met": met,
        }


PRODUCTS, COPY = "ceiling: bf16 products", "ceiling: copy"
DENSE, WIDE = (f"dense_match 448, {channels} channels, cuda" for channels in (193, 384))
CAPTURED = "captured pair to matches and back, demonstration pair,"
PAIR = "pair to mutual matches, demonstration pair, photographs, graph"
# UPLiFT's Fast Mode, one 2x step, as published for an H100 PCIe in bfloat16; milliseconds.
UPLIFT = {"B1 224": 0.31, "B1 448": 1.14, "B1 896": 4.04}
GROUPS = "nearest bf16, tile groups 128x256x64, 4 stages"
WIDE_TILE = (256, 64, 3, 64, 8, 3, 2, 1)
PLAIN = "plain bf16 channels_last"
OURS = "training step, ours"
STREAM = "extract_images 448, an image"
COMPILED = "CosineEmbeddingLoss compiled fp32"


# Each makes a measure, a function of the figures, from the names that the method of Figures takes.
_ms, _us, _over, _value, _share = (partial(methodcaller, name) for name in ("ms", "us", "over", "value", "share"))
_of_products = partial(methodcaller, "of", PRODUCTS, "flops")
_of_copy = partial(methodcaller, "of", COPY, "bytes")


def table() -> list[Prediction]:
    """Every prediction and goal, in the order of the report."""
    one, many = "forward B1 448", "forward B64 448"
    encoder = "image encoder B64 448, cuda"
    loss, permuted = "cosine loss fp32", "permuted copies and CosineEmbeddingLoss fp32"
    dense, mutual, bf16, chunks = f"{DENSE}, graph", f"{DENSE}, mutual, graph", "nearest bf16", "chunked matmul + max"
    row = Prediction
    found = [
        row(f"{one}, graph replay", _us(one), "us", "25", 35),
        row(f"{one} over eager plain bf16", _over(f"{one}, {PLAIN}", one), "x", "", 6, True),
        row(f"{one} over a graph of the plain form", _over(f"{one}, {PLAIN}, graph", one), "x", ""),
        row(f"{one} over the plain form compiled", _over(f"{one}, plain compiled", one), "x", "", 2, True),
        row("host time of LiFT.forward, B1 448", _us(f"{one}, host alone"), "us", "", 40),
        row("image encoder B1 448", _us("image encoder B1 448, cuda"), "us", "6 to 8"),
        row("upsample B1 448", _us("upsample B1 448"), "us", "7"),
        row("head B1 448", _us("head B1 448"), "us", "9"),
        row(many, _us(many), "us", "580"),
        row(f"{many}, of the products' ceiling", _of_products(many), "", "0.68", 0.6, True),
        row(f"{many} over plain bf16", _over(f"{many}, {PLAIN}", many), "x", "", 3, True),
        row(f"{many} over the plain form compiled", _over(f"{many}, plain compiled", many), "x", "", 1.5, True),
        row("image encoder B64 448", _us(encoder), "us", "50 to 55"),
        row("image encoder B1 448, spread", _us("image encoder B1 448, cuda, spread"), "us", "9 to 10"),
        row("image encoder B64 448, stream", _us(f"{encoder}, stream"), "us", "60 to 75"),
        row("image encoder B64 448, of copy", _of_copy(encoder), "", "0.42 to 0.46", 0.6, True),
        row("upsample B64 448", _us("upsample B64 448"), "us", "260"),
        row("head B64 448", _us("head B64 448"), "us", "290"),
        row("upsample B64 448, wide", _us(f"upsample B64 448, tile {WIDE_TILE}"), "us", "255"),
        row("head B64 448, wide", _us(f"head B64 448, tile {WIDE_TILE}"), "us", "265 to 275"),
        row(f"{many}, memory over the least", _value(f"{many}, memory over the least", "ratio"), "x", "1", 1.01),
        row("dense_match 448, 384 channels, graph replay", _ms(f"{WIDE}, graph"), "ms", "0.45 to 0.55", 1),
        row("dense_match 448, 193 channels, graph replay", _ms(dense), "ms", "0.37 to 0.47", 1),
        row(
            "dense_match 448, mutual over one direction",
            _over(mutual, dense),
            "x",
            "1.1 to 1.15",
            1.15,
        ),
        row("dense_match 448, cosines of pixels", _ms(f"{WIDE}, cosines of pixels"), "ms", "2.3 to 2.8"),
        row("dense_match 448, flat features", _ms(f"{WIDE}, flat features"), "ms", "3 to 5"),
        row("dense_match 448, 30 points, graph replay", _ms(f"{WIDE}, 30 points, graph"), "ms", "< 0.1"),
        row(f"{bf16}, 50,176^2", _ms(bf16), "ms", "3.5 to 4.2"),
        row(f"{bf16}, of the products' ceiling", _of_products(bf16), "", "0.58 to 0.7", 0.7, True),
        row(f"{bf16}, mutual over one direction", _over(f"{bf16}, mutual", bf16), "x", "1.3", 1.15),
        row(f"{bf16} over {chunks}", _over(f"{chunks}, bf16", bf16), "x", ""),
        row("nearest bf16 by groups, tma", _ms(f"{GROUPS}, tma, whole call"), "ms", "3.2 to 3.4"),
        row("nearest bf16 by groups, warp", _ms(f"{GROUPS}, warp, whole call"), "ms", "3 to 3.15"),
        row("nearest fp32, 50,176^2", _ms("nearest fp32"), "ms", "4.5 to 6"),
        row(f"nearest fp32 over {chunks}", _over(f"{chunks}, fp32", "nearest fp32"), "x", ""),
        row("pair to mutual matches, graph replay", _ms(PAIR), "ms", "", 3),
        *(
            row(f"captured pair, {side}, {rule}", _ms(f"{CAPTURED} {side}, {rule}"), "ms", "", goal)
            for side, goal in ((448, 3), (896, 8))
            for rule in ("grid", "pixel")
        ),
        row("keys of ViT-S/16 B1 448, graph replay", _ms("keys of ViT-S/16 B1 448, graph"), "ms", "0.4 to 0.6"),
        row("keys of ViT-S/16 B1 896, graph replay", _ms("keys of ViT-S/16 B1 896, graph"), "ms", "1 to 1.5"),
        row(
            "keys of ViT-S/16 B2 896, of the products' ceiling",
            _of_products("keys of ViT-S/16 B2 896, graph"),
            "",
            "0.35 to 0.5",
        ),
        row("extract_images over its networks", _over(STREAM, "backbone and LiFT B16 448, an image"), "x", "1.3 to 2"),
        row("cosine loss fp32, of copy", _of_copy(loss), "", "0.86 to 0.92", 0.85, True),
        row("cosine loss bf16, of copy", _of_copy("cosine loss bf16"), "", "0.8 to 0.9", 0.85, True),
        row("cosine loss fp32 over permuted copies", _over(permuted, loss), "x", "8 to 10", 6, True),
        row("cosine loss fp32 over the compiled form", _over(COMPILED, loss), "x", "", 1.5, True),
        row("cosine loss fp32, peak memory in gradients", _value(loss, "peak in gradients"), "x", "1", 1.05),
        row("training step over the plain fp32 loop", _over("training step, plain fp32", OURS), "x", "6", 6, True),
        row("training step over autocast", _over("training step, plain autocast", OURS), "x", "1.4", 1.5, True),
    ]
    published = "of UPLiFT's time as published for an H100 PCIe"
    found += [row(f"forward {w}, {published}", _share(f"forward {w}", ms), "x", "", 0.1) for w, ms in UPLIFT.items()]
    return found
