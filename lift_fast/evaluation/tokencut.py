"""TokenCut: the foreground object of one image from a normalised cut of its tokens' similarity graph.

The published procedure (Wang et al., "Self-Supervised Transformers for Unsupervised Object Discovery using Normalized
Cut", CVPR 2022) builds dense N x N matrices and hands them to a dense generalised eigensolver. The graph is binary, so
here it is a matrix of bits, and the only eigenvector of interest comes from a Lanczos iteration on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lift_fast import memory

from .bit_graph import BitGraph

TAU = {"voc07": 0.2, "voc12": 0.2, "coco20k": 0.3}
"""Thresholds of the published evaluations."""
EPS = 1e-5

# Bound, in radians, of the angle between the computed eigenvector and the exact one.
_ANGLE = 1e-9
# Eigenvalues (in -1 .. 1) closer than this count as equal: float64 cannot tell their vectors apart.
_SAME = 1e-10
# Entries that differ by less than this share of the largest count as equal, so that rounding never decides the seed.
_TIE = 1e-7
_MOST_STEPS, _CHECK_EVERY = 400, 4
# For fewer nodes the dense solver is faster.
_SMALL = 48
# Rows of similarities computed at one time.
_PANEL = 512


class NotFiniteError(ValueError):
    """Features that hold NaN or infinity, so that their cosines mean nothing."""


@dataclass(frozen=True)
class Eigenpair:
    """The second smallest solution of (D - W) x = lambda D x."""

    vector: Tensor
    """[N] float64, x^T D x = 1; its sign is arbitrary."""
    value: float
    """lambda, 0 to 2."""
    gap: float
    """Estimated distance to the next eigenvalue; 0 if they count as equal."""
    degenerate: bool
    """Several eigenvectors share the eigenvalue: the vector is a start vector's projection onto their span."""
    solver: str
    """``"lanczos"`` or ``"dense"``."""
    products: int
    """Number of matrix-vector products."""


@dataclass(frozen=True)
class TokenCut:
    """Result of :func:`tokencut`."""

    eigenvector: npt.NDArray[np.float64]
    """[h, w], positive at the seed."""
    foreground: npt.NDArray[np.bool_]
    """[h, w], the side of the cut that holds the seed."""
    component: npt.NDArray[np.bool_]
    """[h, w], the part of the foreground that is connected (4 neighbours) with the seed."""
    seed: tuple[int, int]
    """(row, column)"""
    cells: tuple[int, int, int, int]
    """(top, left, bottom, right) of the component's box in cells, bottom and right excluded."""
    degenerate: bool
    """The graph does not determine the cut; see :func:`tokencut`."""
    value: float
    gap: float
    solver: str
    products: int

    def box(
        self, size: tuple[int, int], covered: tuple[float, float, float, float] | None = None
    ) -> tuple[float, float, float, float]:
        """The box in pixels: (x0, y0, x1, y1), continuous, so that a whole image is (0, 0, width, height).

        Args:
            size: (height, width) of the image, to which the box is clipped.
            covered: (top, left, height, width) of the pixels over which the cells lie side by side; None for the whole
                image. A cell is one patch of a plain backbone, half a patch after LiFT.
        """
        top, left, height, width = covered or (0, 0, *size)
        rows, columns = self.eigenvector.shape
        y0, x0, y1, x1 = map(float, self.cells)

        x0, x1 = (min(max(left + cell * width / columns, 0.0), size[1]) for cell in (x0, x1))
        y0, y1 = (min(max(top + cell * height / rows, 0.0), size[0]) for cell in (y0, y1))
        return x0, y0, x1, y1


def tokencut(features: Tensor, grid: tuple[int, int], *, tau: float = 0.2, eps: float = EPS) -> TokenCut:
    """The salient object of one image.

    Two tokens are joined with weight 1 if their cosine is above ``tau``, else with weight ``eps``. The second smallest
    eigenvector of (D - W) x = lambda D x is split at its mean; the foreground is the side of the entry that is largest
    in absolute value (the seed); the object is the foreground's connected component around the seed.

    Three cases that the published code leaves to rounding are decided here. Of several seeds within 1e-7 of the
    largest, the first in reading order is taken, and entries that close to the mean are background. Where the two
    triangles of the cosines differ by rounding, the lower one counts (as for its eigensolver). Where several
    eigenvectors share the eigenvalue, a fixed start vector is projected onto their span (``degenerate``). A graph
    without any cut (complete, without edges, or of a single token) gives the whole grid and is ``degenerate`` too.

    Args:
        features: ``[N, C]`` in reading order, N = h * w, dense, of any floating point dtype and device, and of any
            finite length: 1e-40 and 1e300 count like 1. Cosines are computed in float32 on their device, everything
            else in float64 on the CPU. A row of zeros is similar to no other row.
        grid: (h, w).
        tau: threshold of the cosine.
        eps: weight of the other pairs, 0 < eps < 1.

    Raises:
        TypeError: if ``features`` is not a dense floating point tensor.
        NotFiniteError: a ``ValueError``, for NaN or infinity in any cell.
        ValueError: for a wrong shape, a tensor on ``meta``, or thresholds out of range.
    """
    h, w = _check(features, grid, tau, eps)
    graph = similarity_graph(features, tau)
    count, degree = graph.count, graph.degree
    trivial = count == 1 or bool((degree == count).all()) or not graph.has_edges()
    if trivial:
        everywhere = np.ones((h, w), dtype=bool)
        flat = np.full((h, w), 1 / math.sqrt(count))
        return TokenCut(flat, everywhere, everywhere, (0, 0), (0, 0, h, w), True, 0.0, 0.0, "none", 0)
    pair = second_eigenvector(graph, eps)
    vector = pair.vector.numpy()
    largest = np.abs(vector).max()
    seed = int(np.flatnonzero(np.abs(vector) >= (1 - _TIE) * largest)[0])
    vector = vector * np.sign(vector[seed])
    foreground = (vector > vector.mean() + _TIE * largest).reshape(h, w)
    at = divmod(seed, w)
    component = _component(foreground, at)
    rows, columns = np.flatnonzero(component.any(1)), np.flatnonzero(component.any(0))
    cells = (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
    known = (pair.degenerate, pair.value, pair.gap, pair.solver, pair.products)
    return TokenCut(vector.reshape(h, w), foreground, component, at, cells, *known)


def similarity_graph(features: Tensor, tau: float) -> BitGraph:
    """Which of the features ``[N, C]`` have a float32 cosine above ``tau``: the lower triangle, mirrored."""
    unit = F.normalize(_near_one(features.detach()), dim=1)
    graph = BitGraph(len(unit))
    for start in range(0, len(unit), _PANEL):
        stop = min(start + _PANEL, len(unit))
        # Only the part below the diagonal is needed.
        graph.set_rows(start, (unit[start:stop] @ unit[:stop].T).cpu(), tau)
    graph.close()
    return graph


def _near_one(features: Tensor) -> Tensor:
    """Each row of ``[N, C]`` times a power of two, in float32, so that its largest value lies from 0.5 to 1.

    Squares of finite values then neither overflow nor vanish, and the cosines of usual features stay the same, bit for
    bit.
    """
    values = features if features.dtype in (torch.float32, torch.float64) else features.float()
    exponents = np.frexp(values.abs().amax(1).double().cpu().numpy())[1]
    # In two steps, because float64 cannot hold 2^1074.
    for part in (-exponents // 2, -exponents - -exponents // 2):
        values = values * torch.from_numpy(np.ldexp(1.0, part)).to(values)[:, None]
    return values.float()


def second_eigenvector(graph: BitGraph, eps: float = EPS, *, solver: str = "auto") -> Eigenpair:
    """The second smallest solution of (D - W) x = lambda D x, for W = 1 on the graph's edges and ``eps`` elsewhere.

    With S = D^-1/2 W D^-1/2 these are the largest solutions of S v = (1 - lambda) v, x = D^-1/2 v. The largest is known
    (v = D^1/2 1) and is projected out. The next comes from Lanczos's iteration in float64, with every vector orthogonal
    to all before it, until its residual over its distance to the next eigenvalue bounds the angle of its error by 1e-9.
    A second iteration from another start then looks for further eigenvectors of the same eigenvalue, which a single
    iteration never finds. If either does not converge, the dense solver is used.

    Args:
        graph: at least two nodes.
        eps: weight of pairs without an edge, > 0.
        solver: ``"auto"``, ``"lanczos"`` (raises instead of falling back) or ``"dense"``.

    Raises:
        ValueError: for fewer than two nodes or an unknown solver.
        ArithmeticError: if ``solver="lanczos"`` and it does not converge.
    """
    if graph.count < 2:
        raise ValueError(f"a graph of {graph.count} nodes has no second eigenvector; expected at least 2")
    if solver not in ("auto", "lanczos", "dense"):
        raise ValueError(f"solver must be 'auto', 'lanczos' or 'dense', got {solver!r}")
    operator = _NormalisedAffinity(graph, eps)
    # One start for each size: every run on every machine takes the same vector of a degenerate eigenspace.
    seeded = torch.Generator(device="cpu").manual_seed(graph.count)
    starts = torch.randn(2, graph.count, generator=seeded, dtype=torch.float64, device="cpu")
    if solver == "lanczos" or (solver == "auto" and graph.count > _SMALL):
        found = _lanczos_pair(operator, starts)
        if found is not None:
            return found
        if solver == "lanczos":
            raise ArithmeticError(f"Lanczos's iteration did not converge in {_MOST_STEPS} steps; use solver='auto'")
    return _dense_pair(operator, starts[0])


class _NormalisedAffinity:
    """S = D^-1/2 W D^-1/2 as an operator."""

    def __init__(self, graph: BitGraph, eps: float) -> None:
        self.graph, self.eps = graph, eps
        degree = (1 - eps) * graph.degree.double() + eps * graph.count
        self.root = degree.rsqrt()
        first = degree.sqrt()
        self.first = first / first.norm()
        self.products = 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.products += 1
        scaled = self.root * vector
        return self.root * ((1 - self.eps) * self.graph.multiply(scaled) + self.eps * scaled.sum())

    def dense(self) -> Tensor:
        weights = self.graph.dense().mul_(1 - self.eps).add_(self.eps)
        return weights.mul_(self.root).mul_(self.root[:, None])


@dataclass(frozen=True)
class _Ritz:
    """The largest eigenvalue that a start vector leads to."""

    value: float
    residual: float
    gap: float
    vector: Tensor


# Of (value, residual, gap) of the largest Ritz value.
_Enough = Callable[[float, float, float], bool]


def _lanczos(operator: _NormalisedAffinity, start: Tensor, without: list[Tensor], enough: _Enough) -> _Ritz | None:
    """The top Ritz pair orthogonal to ``without``, once it is ``enough``; None if it does not converge."""
    count, kept = len(start), len(without)
    most = min(_MOST_STEPS, count - kept)
    basis = memory.empty(kept + most + 1, count, dtype=torch.float64, device="cpu")
    for row, vector in enumerate(without):
        basis[row] = vector
    alpha, beta = np.zeros(most), np.zeros(most + 1)

    def orthogonal(vector: Tensor, rows: int) -> Tensor:
        # Twice is enough (Kahan): the first pass leaves the rounding errors of a much longer vector.
        for _ in range(2):
            vector = vector - basis[:rows].T @ (basis[:rows] @ vector)
        return vector

    vector = orthogonal(start / start.norm(), kept)
    basis[kept] = vector / vector.norm()
    for step in range(most):
        current = kept + step
        image = operator(basis[current])
        alpha[step] = float(image @ basis[current])
        image = orthogonal(image, current + 1)
        beta[step + 1] = float(image.norm())
        # The largest eigenvalue is 1: anything below this is rounding, and the space is invariant.
        exhausted = beta[step + 1] < 1e-13 or step + 1 == count - kept
        if not exhausted:
            basis[current + 1] = image / beta[step + 1]
        if exhausted or (step + 1) % _CHECK_EVERY == 0 or step + 1 == most:
            values, vectors = _tridiagonal(alpha[: step + 1], beta[1 : step + 1])
            residuals = np.zeros(step + 1) if exhausted else beta[step + 1] * np.abs(vectors[-1])
            # Rounding splits a multiple eigenvalue; each part is weighted by its share of the start vector.
            cluster = values > values[-1] - _SAME
            gap = math.inf if cluster.all() else float(values[-1] - values[~cluster][-1])
            residual = float(residuals[cluster].max())
            settled = bool(cluster.all()) or float(residuals[~cluster][-1]) <= 0.5 * gap
            if exhausted or (settled and enough(float(values[-1]), residual, gap)):
                weights = vectors[:, cluster] @ vectors[0, cluster]
                ritz = basis[kept : current + 1].T @ torch.from_numpy(weights)
                return _Ritz(float(values[-1]), residual, gap, ritz / ritz.norm())
    return None


def _tridiagonal(
    diagonal: npt.NDArray[np.float64], off_diagonal: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Eigenvalues, ascending, and eigenvectors (columns) of a symmetric tridiagonal matrix."""
    matrix = torch.diag(torch.from_numpy(diagonal))
    matrix.diagonal(-1).copy_(torch.from_numpy(off_diagonal))
    # Not NumPy's: its threads and PyTorch's wait for each other far longer than this takes.
    values, vectors = torch.linalg.eigh(matrix)
    return values.numpy(), vectors.numpy()


def _lanczos_pair(operator: _NormalisedAffinity, starts: Tensor) -> Eigenpair | None:
    top = _lanczos(operator, starts[0], [operator.first], lambda _, residual, gap: residual <= _ANGLE * gap)
    if top is None:
        return None

    def settles(value: float, residual: float, _: float) -> bool:
        return residual <= max(0.5 * (top.value - value), 0.1 * _SAME)

    others = len(starts[0]) - 2
    other = _lanczos(operator, starts[1], [operator.first, top.vector], settles) if others else None
    if others and (other is None or other.value > top.value + _SAME):
        return None
    gap = top.gap if other is None else min(top.gap, top.value - other.value)
    return _pair(operator, top.value, gap, top.vector, "lanczos")


def _dense_pair(operator: _NormalisedAffinity, start: Tensor) -> Eigenpair:
    # All eigenvalues lie in -1 .. 1: this moves the known one below the others.
    matrix = operator.dense() - 3 * torch.outer(operator.first, operator.first)
    values, vectors = torch.linalg.eigh(matrix)
    cluster = values > values[-1] - _SAME
    span = vectors[:, cluster]
    vector = span @ (span.T @ start)
    value = float(values[-1])
    # The last of the ascending values below is the known one.
    gap = 0.0 if span.shape[1] > 1 else (value - float(values[-2]) if len(values) > 2 else math.inf)
    return _pair(operator, value, gap, vector / vector.norm(), "dense")


def _pair(operator: _NormalisedAffinity, value: float, gap: float, vector: Tensor, solver: str) -> Eigenpair:
    degenerate = gap < _SAME
    gap = 0.0 if degenerate else gap
    return Eigenpair(operator.root * vector, 1 - value, gap, degenerate, solver, operator.products)


def _component(foreground: npt.NDArray[np.bool_], at: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The cells of ``foreground`` connected with ``at`` through neighbours above, below, left and right."""
    within = np.pad(foreground, 1)
    reached = np.zeros_like(within)
    reached[at[0] + 1, at[1] + 1] = True
    size = 1
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        reached = grown & within
        new = int(reached.sum())
        if new == size:
            return reached[1:-1, 1:-1]
        size = new


def _check(features: Tensor, grid: tuple[int, int], tau: float, eps: float) -> tuple[int, int]:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = str(features.dtype) if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"features must be a floating point tensor [N, C], got {got}")
    if features.layout != torch.strided or features.is_nested:
        kind = "a nested one" if features.is_nested else f"layout {features.layout}"
        raise TypeError(f"features must be a dense tensor [N, C], got {kind}")
    if features.is_meta:
        raise ValueError("features are on the device meta and hold no values; give a tensor with values")
    h, w = grid
    if features.ndim != 2 or features.shape[1] == 0 or min(h, w) < 1 or features.shape[0] != h * w:
        raise ValueError(
            f"features must be [N, C] with N = h * w >= 1 tokens of the grid {h} x {w} and C >= 1, "
            f"got {list(features.shape)}; leave out the class token"
        )
    # PyTorch can do little more with the 8-bit formats than convert them.
    if not bool(torch.isfinite(features.float() if features.element_size() == 1 else features).all()):
        raise NotFiniteError("features hold NaN or infinity; check that the image and the weights are finite")
    if not 0 < eps < 1:
        raise ValueError(f"eps must lie between 0 and 1, got {eps}")
    if not math.isfinite(tau):
        raise ValueError(f"tau must be a finite cosine, got {tau}")
    return h, w
