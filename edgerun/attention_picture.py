"""The blocks chosen for a prompt over the attention that each would have got, as a report's Picture.

Three ramps of like lightness: a block's attention is read from its lightness and its fate from its hue. The PNG is
written here, with zlib and numpy: pillow comes only with the "video" extra, and reports are made without it.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgerun.drawing import shades
from edgerun.report import Axis, Picture, Ramp, format_number

_LEVELS = 64  # shades of a ramp: with the transparent one, three ramps fit into a palette
_SHARPNESS = 1600  # least pixels along the longer side: the browser then shrinks, and blurs no edge
_LEFT_OUT = ("#f4f4f1", "#cfcfcb", "#a3a4a3", "#747678", "#46494d")
_CHOSEN = ("#d3e5fb", "#9cc4f2", "#5f9de0", "#2c70bd", "#0f437f")
_MISSED = ("#ff9b3f", "#f47c20", "#e2611a", "#bf3d0c", "#8f2405")

Matrix = np.ndarray[Any, np.dtype[Any]]


def attention_picture(
    title: str,
    attention: Matrix,
    chosen: Matrix,
    *,
    x: Axis,
    y: Axis,
    scale: Axis,
    threshold: float,
    note: str = "",
) -> Picture:
    """The picture of a choice: what was chosen, what was missed, and what was left out with reason.

    attention: [queries, keys], NaN where a query does not see a key; chosen: [queries, keys], bool; x and y: what keys
    and queries are, with their low and high; scale: of the attention, logarithmic from low to high; threshold: the
    attention from which a block that was not chosen is a miss.
    Raises ValueError when shapes, scale or threshold do not fit.
    """
    if attention.ndim != 2 or attention.shape != chosen.shape or not attention.size:
        raise ValueError(f"attention of {attention.shape} and choice of {chosen.shape}: both are [queries, keys]")
    low, high = scale.low, scale.high
    if low is None or high is None or not 0 < low <= threshold < high:
        raise ValueError(f"threshold {threshold} on a scale of {low} to {high}: 0 < low <= threshold < high")
    seen = ~np.isnan(attention)
    known = np.where(seen, attention, 0.0)
    chosen = chosen.astype(bool) & seen
    missed = seen & ~chosen & (known >= threshold)
    share = np.log(np.maximum(known, low) / low) / np.log(high / low)
    level = np.minimum(share * _LEVELS, _LEVELS - 1).astype(int)
    kind = np.where(chosen, 1, np.where(missed, 2, 0))
    pixels = np.where(seen, 1 + kind * _LEVELS + level, 0).astype(np.uint8)
    first = float(np.log(threshold / low) / np.log(high / low))
    ramps = (shades(_LEFT_OUT, _LEVELS), shades(_CHOSEN, _LEVELS), shades(_MISSED, _LEVELS, first))
    palette = ["#000000", *(colour for ramp in ramps for colour in ramp)]

    blocks = 100 * float(chosen.sum() / max(1, seen.sum()))
    total = float(known.sum()) or 1.0
    kept, lost = (100 * float(known[which].sum()) / total for which in (chosen, missed))
    least, count = f"{format_number(threshold)} {scale.unit}".strip(), f"{int(missed.sum()):,}"
    factor = -(-_SHARPNESS // max(pixels.shape))
    return Picture(
        title=title,
        x=x,
        y=y,
        rows=pixels.shape[0],
        columns=pixels.shape[1],
        png=base64.b64encode(png(pixels.repeat(factor, 0).repeat(factor, 1), palette)).decode(),
        alt=f"Of the blocks that queries see, {blocks:.1f} % are chosen and hold {kept:.1f} % of the attention; "
        f"{count} of at least {least} are missed, which hold {lost:.1f} %.",
        scale=scale,
        ramps=(
            Ramp("not chosen", _LEFT_OUT),
            Ramp(f"chosen: {blocks:.1f} % of blocks, {kept:.1f} % of attention", _CHOSEN),
            Ramp(f"missed, {least} or more: {count} blocks, {lost:.1f} % of attention", _MISSED, threshold),
        ),
        note=note,
    )


def png(pixels: Matrix, palette: Sequence[str]) -> bytes:
    """An indexed PNG of [height, width] uint8; the palette's first colour is transparent (PNG 1.2, section 4)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1)  # filter 0 before every row
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", b"".join(bytes.fromhex(colour[1:]) for colour in palette)),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(rows.tobytes(), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)
