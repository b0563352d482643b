"""An undirected graph as a matrix of bits, and its product with a vector."""

from __future__ import annotations

import torch
from torch import Tensor

from lift_fast import _env, _native, devices, memory


class BitGraph:
    """A graph of ``count`` nodes, filled row by row from similarities.

    With the native core one pair of nodes takes one bit: 1.2 MB for 3136 nodes, which fit the cache, against 79 MB as
    float64. Without it the plain form keeps that float64 matrix. It lies on the CPU, whatever PyTorch's default device
    is.

    Attributes:
        degree: [N] int64, edges of each node, including one to itself; known after :meth:`close`.
    """

    def __init__(self, count: int, *, native: bool | None = None) -> None:
        """A graph without edges yet; raises ``ValueError`` for fewer than one node.

        ``native``: None takes the native core if it is available; True raises ``RuntimeError`` without it.
        """
        if count < 1:
            raise ValueError(f"a graph needs at least one node, got {count}")
        self.count = count
        self.degree = torch.zeros(count, dtype=torch.int64, device="cpu")
        use_native = devices.native_runs()[0] if native is None else native
        self._core = _native.require() if use_native else None
        self._words = (count + 63) // 64
        self._filled = 0
        if self._core is not None:
            self._bits = memory.zeros(64 * self._words, self._words, dtype=torch.int64, device="cpu")
        else:
            self._matrix = torch.zeros(count, count, dtype=torch.float64, device="cpu")

    def set_rows(self, start: int, similarity: Tensor, tau: float) -> None:
        """Edges of the nodes ``start .. start + R - 1`` to those before them and among them: similarity > tau.

        Args:
            start: the next row without edges; a multiple of 64.
            similarity: ``[R, start + R]`` float32 on the CPU. Values above the graph's diagonal are not read, so the
                graph is undirected whatever rounding does.
            tau: threshold; NaN does not make an edge.

        Raises:
            ValueError: for rows out of order, or of another shape, dtype or device.
        """
        rows = len(similarity)
        stop = start + rows
        if start != self._filled or start % 64 or stop > self.count or rows == 0:
            raise ValueError(
                f"expected rows from {self._filled} (a multiple of 64) up to {self.count}, got {start} .. {stop}"
            )
        if similarity.shape != (rows, stop) or similarity.dtype != torch.float32 or similarity.device.type != "cpu":
            raise ValueError(
                f"similarity must be [{rows}, {stop}] float32 on the CPU, got {list(similarity.shape)} "
                f"{similarity.dtype} on {similarity.device}"
            )
        self._filled = stop
        if self._core is not None:
            similarity = similarity.resolve_neg().contiguous()
            self._core.bit_matrix_set_rows_f32(
                _native.address(similarity),
                start,
                rows,
                self.count,
                tau,
                _native.address(self._bits),
                torch.get_num_threads(),
            )
        else:
            edges = (similarity > tau).tril(start)
            self._matrix[start:stop, :stop] = edges.double()
            self._matrix[:stop, start:stop] = torch.maximum(self._matrix[:stop, start:stop], edges.T.double())

    def close(self) -> None:
        """Finish the graph after all rows; a ``ValueError`` if rows are missing."""
        if self._filled != self.count:
            raise ValueError(f"{self._filled} of {self.count} rows are set")
        self.degree = self.multiply(torch.ones(self.count, dtype=torch.float64, device="cpu")).round().long()

    def has_edges(self) -> bool:
        """Whether any two different nodes are joined."""
        return bool((self.degree > self.diagonal()).any())

    def diagonal(self) -> Tensor:
        """[N] int64: 1 where a node is joined to itself."""
        if self._core is None:
            return self._matrix.diagonal().long()
        nodes = torch.arange(self.count, dtype=torch.int64, device="cpu")
        return (self._bits[nodes, nodes // 64] >> (nodes % 64)) & 1

    def multiply(self, vector: Tensor) -> Tensor:
        """For each node the sum of ``vector`` over the nodes that it is joined to.

        ``vector`` is [N] float64 on the CPU and finite; another shape, dtype or device is a ``ValueError``.
        """
        if vector.shape != (self.count,) or vector.dtype != torch.float64 or vector.device.type != "cpu":
            raise ValueError(
                f"vector must be [{self.count}] float64 on the CPU, got {list(vector.shape)} {vector.dtype} "
                f"on {vector.device}"
            )
        if self._core is None:
            return self._matrix @ vector
        vector = vector.resolve_neg().contiguous()
        out = memory.empty(self.count, dtype=torch.float64, device="cpu")
        self._core.bit_matrix_multiply_f64(
            _native.address(self._bits),
            self.count,
            _native.address(vector),
            _native.address(out),
            torch.get_num_threads(),
            _env.cpu_isa(),
        )
        return out

    def dense(self) -> Tensor:
        """[N, N] float64, 1 where there is an edge; a copy."""
        if self._core is None:
            return self._matrix.clone()
        columns = torch.arange(64, dtype=torch.int64, device="cpu")
        bits = (self._bits[: self.count, :, None] >> columns) & 1
        return bits.view(self.count, -1)[:, : self.count].double()
