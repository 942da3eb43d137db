"""A clip in a report: Pillow reads back every frame as it was, and the report keeps it in JSON."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image, ImageSequence

from edgerun.clip_picture import moving_picture


def frames_of(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 12, 3), dtype=np.uint8)


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_the_animation_has_every_frame_and_the_clips_length() -> None:
    frames = frames_of(51)
    clip = moving_picture("a clip", frames, 17.0, alt="noise", group="g", note="n")
    animation = opened(clip.webp)
    shown, length = [], 0
    for frame in ImageSequence.Iterator(animation):
        frame.load()
        shown.append(np.asarray(frame.convert("RGB")))
        length += frame.info["duration"]
    assert np.array_equal(np.stack(shown), frames)
    assert length == 3000
    assert (clip.frames, clip.height, clip.width, clip.fps) == (51, 8, 12, 17.0)
    assert (clip.alt, clip.group, clip.note) == ("noise", "g", "n")


def test_the_sheet_goes_from_the_first_frame_to_the_last() -> None:
    frames = frames_of(35)
    sheet = np.asarray(opened(moving_picture("a clip", frames, 17.0, alt="noise").png).convert("RGB"))
    assert sheet.shape == (2 * 8, 9 * 12, 3)
    for place, frame in enumerate(frames[::2]):  # 18 of 35: every other one
        top, left = 8 * (place // 9), 12 * (place % 9)
        assert np.array_equal(sheet[top : top + 8, left : left + 12], frame)


@pytest.mark.parametrize(("count", "rows", "columns"), [(3, 1, 3), (9, 1, 9), (17, 1, 9), (18, 2, 9)])
def test_few_frames_make_a_smaller_sheet(count: int, rows: int, columns: int) -> None:
    sheet = opened(moving_picture("a clip", frames_of(count), 17.0, alt="noise").png)
    assert sheet.size == (columns * 12, rows * 8)


def test_one_frame_is_a_clip_too() -> None:
    frames = frames_of(1)
    clip = moving_picture("a picture", frames, 24.0, alt="noise")
    assert np.array_equal(np.asarray(opened(clip.webp).convert("RGB")), frames[0])
    assert np.array_equal(np.asarray(opened(clip.png).convert("RGB")), frames[0])


@pytest.mark.parametrize(
    "frames",
    [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3), np.float32)],
    ids=["no frame", "no channels", "floats"],
)
def test_what_is_no_clip_is_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="give uint8"):
        moving_picture("a clip", frames, 17.0, alt="")
