"""Sizes and tile grids of images: the rounding rules that image processors have in common.

All functions take the height before the width, as image processors do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Grid(NamedTuple):
    """A number of rows and columns: of tiles, or of features."""

    rows: int
    columns: int

    @property
    def cells(self) -> int:
        """The number of tiles or features."""
        return self.rows * self.columns


def fit_area(height: int, width: int, unit: int, least: float, most: float, frames: int = 1, fewest: int = 0) -> Grid:
    """Resize an image to multiples of `unit` pixels, so that its area is within limits. Return the size in units.

    The aspect ratio is kept approximately. Sides are rounded to the nearest multiple, or down if the area is too large,
    or up if it is too small.

    Args:
        height, width: the size in pixels.
        unit: side of a unit in pixels.
        least, most: limits of the area in pixels, for all frames together.
        frames: number of frames that the processor makes of the image.
        fewest: minimum number of units of a side after it is rounded to the nearest multiple.

    >>> fit_area(480, 640, 28, 3136, 1003520)
    Grid(rows=17, columns=23)
    """
    rows, columns = (max(fewest, round(side / unit)) for side in (height, width))
    area = frames * rows * columns * unit**2
    if area > most:
        scale = math.sqrt(frames * height * width / most)
        rows, columns = (max(1, math.floor(side / scale / unit)) for side in (height, width))
    elif area < least:
        scale = math.sqrt(least / (frames * height * width))
        rows, columns = (math.ceil(side * scale / unit) for side in (height, width))
    return Grid(rows, columns)


def closest_ratio(height: int, width: int, fewest: int, most: int, tile_area: int) -> Grid:
    """Return the grid of `fewest` to `most` tiles whose aspect ratio is closest to that of the image.

    Of two grids that are equally close, the larger one is used if the image covers more than half of its area.

    >>> closest_ratio(480, 640, 1, 12, 448 * 448)
    Grid(rows=3, columns=4)
    """
    best, smallest_gap = Grid(1, 1), math.inf
    for grid in _iter_grids(fewest, most):
        gap = abs(width / height - grid.columns / grid.rows)
        if gap < smallest_gap or (gap == smallest_gap and width * height > 0.5 * tile_area * grid.cells):
            best, smallest_gap = grid, gap
    return best


def _iter_grids(fewest: int, most: int) -> Iterator[Grid]:
    """Yield all grids of `fewest` to `most` tiles: the smallest first, and of equal size the narrowest first."""
    for count in range(fewest, most + 1):
        yield from (Grid(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0)


def least_upscaling(height: int, width: int, tile: int, most: int, *, largest: bool = False) -> Grid:
    """Return the grid of up to `most` tiles that shows the image with the least upscaling, or else least downscaling.

    Of several such grids, the smallest is used. If `largest` is true, the image is scaled up as much as possible.
    """
    scales = {
        # Llama's processor compares the scales in this precision.
        grid: min(np.float32(grid.columns * tile / width), np.float32(grid.rows * tile / height))
        for grid in _iter_grids(1, most)
    }
    upscales = [scale for scale in scales.values() if scale >= 1]
    choose = max if largest or not upscales else min
    scale = choose(upscales or scales.values())
    return min((grid for grid in scales if scales[grid] == scale), key=lambda grid: grid.cells)


def most_pixels(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the (height, width) of `sizes` in which an image keeps the most pixels, and then wastes the least area."""

    def quality(size: tuple[int, int]) -> tuple[int, int]:
        scale = min(size[1] / width, size[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - size[0] * size[1]

    return max(sizes, key=quality)


def cut_padding(height: int, width: int, grid: Grid) -> Grid:
    """Return the rows and columns of features that are left if the padding around an image is cut on both sides."""
    rows, columns = grid
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return Grid(rows, columns)
