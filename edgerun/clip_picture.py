"""A clip as a report's MovingPicture: an animated image, and a sheet of its frames, for paper and a closer look."""

from __future__ import annotations

import base64
import io

import numpy as np

from edgerun.report import MovingPicture

_SHEET_ROWS, _SHEET_COLUMNS = 2, 9  # at most


def moving_picture(
    title: str, frames: np.ndarray, fps: float, *, alt: str, group: str = "", note: str = ""
) -> MovingPicture:
    """The picture of frames uint8 [T, H, W, 3], T at least 1, without loss (WebP and PNG, by Pillow).

    The sheet has evenly spread frames row by row, from the first to the last.
    Raises ValueError for another shape or dtype.
    """
    from PIL import Image

    if frames.ndim != 4 or frames.shape[3] != 3 or not len(frames) or frames.dtype != np.uint8:
        raise ValueError(
            f"frames of {list(frames.shape)} and {frames.dtype}; give uint8 [T, H, W, 3] with T at least 1"
        )
    first, *rest = (Image.fromarray(frame) for frame in frames)
    animation, sheet = io.BytesIO(), io.BytesIO()
    # As whole milliseconds that add up to the clip's length.
    ends = np.rint(np.arange(len(frames) + 1) * 1000.0 / fps).astype(int)
    durations = np.diff(ends).tolist()
    first.save(animation, "WEBP", save_all=True, append_images=rest, duration=durations, loop=0, lossless=True)
    count, height, width, _ = frames.shape
    columns = min(count, _SHEET_COLUMNS)
    rows = min(_SHEET_ROWS, count // columns)
    chosen = frames[np.linspace(0, count - 1, rows * columns).round().astype(int)]
    grid = chosen.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    Image.fromarray(grid).save(sheet, "PNG", optimize=True)
    animated, still = (base64.b64encode(data.getvalue()).decode("ascii") for data in (animation, sheet))
    return MovingPicture(title, animated, still, count, height, width, float(fps), alt, note, group)
