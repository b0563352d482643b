"""What a dense field of matches says: a spread sample of it, and its value between the points of its grid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Candidates for each point of a sample: more would only be neighbours of each other.
_CANDIDATES = 4
# Of more points the distances take too long; they are so dense that the best of each square will do.
_MOST_APART = 1000


def spread_sample(
    valid: npt.NDArray[np.bool_], confidence: npt.NDArray[np.floating], count: int
) -> npt.NDArray[np.int64]:
    """Up to ``count`` (row, column) of valid points ``[n, 2]``: the most confident first, and spread over the grid.

    A point is taken if no more confident one was taken near it. "Near" starts at the spacing of ``count`` points spread
    evenly over the grid and shrinks until there are enough: where matches cover a part of the image they fill that.
    """
    if count < 1:
        return np.zeros((0, 2), dtype=np.int64)
    candidates = _best_of_squares(valid, confidence, count if count > _MOST_APART else _CANDIDATES * count)
    # Stable, so that equal confidence keeps the order of rows.
    candidates = candidates[np.argsort(-confidence[tuple(candidates.T)], kind="stable")]
    if count > _MOST_APART or count >= len(candidates):
        return candidates[:count]
    taken: list[int] = []
    room = np.full(len(candidates), np.inf)
    apart = max(1.0, (valid.size / count) ** 0.5)
    while len(taken) < count:
        best = int(np.argmax(room >= apart**2))
        if room[best] < apart**2:
            apart = max(1.0, 0.7 * apart)
            continue
        taken.append(best)
        # Squared distances to the nearest point taken.
        np.minimum(room, np.square(candidates - candidates[best]).sum(1), out=room)
    return candidates[sorted(taken)]


def _best_of_squares(
    valid: npt.NDArray[np.bool_], confidence: npt.NDArray[np.floating], count: int
) -> npt.NDArray[np.int64]:
    """The most confident valid (row, column) of each square of the grid, squares so small that ``count`` are left."""
    side = max(1, int((valid.sum() / count) ** 0.5))
    rows, columns = (-(-length // side) for length in valid.shape)
    padded = np.full((rows * side, columns * side), -np.inf, dtype=confidence.dtype)
    padded[: valid.shape[0], : valid.shape[1]] = np.where(valid, confidence, -np.inf)
    squares = padded.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(rows * columns, side**2)
    best = squares.argmax(1)
    number = np.flatnonzero(squares[np.arange(len(best)), best] > -np.inf)
    corner = np.stack(np.divmod(number, columns), axis=-1) * side
    return corner + np.stack(np.divmod(best[number], side), axis=-1)


def grid_positions(axis: npt.NDArray[np.integer], at: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Positions ``at`` in units of a grid whose points lie at ``axis``, increasing; clamped to its ends."""
    return np.interp(at, axis, np.arange(len(axis)))


def between_points(
    matches: npt.NDArray[np.integer],
    valid: npt.NDArray[np.bool_],
    columns: npt.NDArray[np.floating],
    rows: npt.NDArray[np.floating],
    reach: float,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Matches between the points of a grid, interpolated where neighbours agree.

    A place lies among up to four points. The valid one with the largest bilinear weight leads, and those whose matches
    lie within ``reach`` of its match take part by their weights: nothing is mixed across a jump of the field.

    Args:
        matches: ``[R, C, 2]`` (x, y) in pixels of B.
        valid: ``[R, C]``.
        columns, rows: ``[w]`` and ``[h]`` places in units of the grid, see :func:`grid_positions`.
        reach: pixels of B.

    Returns:
        ``[h, w, 2]`` (x, y) in B; ``[h, w]`` the weight of the valid points, 0 (no match: x and y are -1) to 1.
    """
    (row, down), (column, right) = (_split(at, n) for at, n in zip((rows, columns), valid.shape, strict=True))
    down, wide = down[:, None], valid.shape[1]
    table, known = matches.reshape(-1, 2), valid.ravel()
    weights, there = [], []
    for r, tall in ((row, 1 - down), (row + 1, down)):
        for c, share in ((column, 1 - right), (column + 1, right)):
            # Beyond the last point the weight is 0.
            at = np.minimum(r, valid.shape[0] - 1)[:, None] * wide + np.minimum(c, wide - 1)
            weights.append(tall * share * known[at])
            there.append(table.take(at, axis=0).astype(np.float32))
    covered = sum(weights[1:], start=weights[0])
    leader, most = there[0], weights[0]
    for weight, match in zip(weights[1:], there[1:], strict=True):
        leader = np.where((weight > most)[..., None], match, leader)
        most = np.maximum(weight, most)
    total, xy = np.zeros_like(covered), np.zeros_like(leader)
    for weight, match in zip(weights, there, strict=True):
        apart = np.abs(match - leader)
        weight *= (apart[..., 0] <= reach) & (apart[..., 1] <= reach)
        total += weight
        xy += weight[..., None] * match
    xy /= np.maximum(total, 1e-12)[..., None]
    xy[covered == 0] = -1
    return xy, covered


def enlarge(
    grid: npt.NDArray[np.floating], columns: npt.NDArray[np.floating], rows: npt.NDArray[np.floating]
) -> npt.NDArray[np.floating]:
    """Bilinear ``[h, w]`` of a grid ``[R, C]`` at the places of :func:`between_points`."""
    (row, down), (column, right) = (_split(at, n) for at, n in zip((rows, columns), grid.shape, strict=True))
    tall = grid[row] + down[:, None] * (grid[np.minimum(row + 1, len(grid) - 1)] - grid[row])
    left = tall[:, column]
    return left + right * (tall[:, np.minimum(column + 1, grid.shape[1] - 1)] - left)


def interpolate(image: npt.NDArray[np.uint8], xy: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Bilinear ``[h, w, 3]`` of an image ``[H, W, 3]`` at (x, y) ``[h, w, 2]``, clamped to its border."""
    height, width = image.shape[:2]
    (left, right), (above, down) = (
        _split(np.clip(xy[..., axis], 0, side - 1), side) for axis, side in ((0, width), (1, height))
    )
    pixels = image.reshape(-1, 3)
    mixed = np.zeros((*left.shape, 3), np.float32)
    for y, tall in ((above, 1 - down), (np.minimum(above + 1, height - 1), down)):
        for x, wide in ((left, 1 - right), (np.minimum(left + 1, width - 1), right)):
            mixed += (tall * wide)[..., None] * pixels.take(y * width + x, axis=0)
    return mixed


def _split(at: npt.NDArray[np.floating], length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The point before each place among ``length`` points, not the last, and the share of the way to the next."""
    low = np.minimum(at.astype(np.int64), max(0, length - 2))
    return low, (at - low).astype(np.float32)
