"""Pictures: the PNG is one that others read, and every pixel says whether its block was chosen, missed or left out."""

from __future__ import annotations

import base64
import dataclasses
import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from edgerun import picture
from edgerun.attention_picture import attention_picture, png
from edgerun.report import Axis, Picture, Ramp

ATTENTION = np.array([[50.0, np.nan, np.nan], [0.1, 20.0, np.nan], [5.0, 0.01, 30.0]])
CHOSEN = np.array([[True, True, False], [True, False, False], [False, False, True]])
SCALE = Axis("attention of a block", "% of its row", log=True, low=0.01, high=100.0)


def made(attention: np.ndarray = ATTENTION, chosen: np.ndarray = CHOSEN, threshold: float = 1.0) -> Picture:
    """A picture of three tiles and three blocks, where nothing else is asked."""
    tokens = Axis("position", "tokens", low=0.0, high=192.0)
    return attention_picture(
        "Chosen", attention, chosen, x=tokens, y=tokens, scale=SCALE, threshold=threshold, note="one prompt"
    )


def pixels(drawn: Picture) -> np.ndarray:
    """[rows, columns, RGBA]: one pixel out of the middle of every block."""
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn.png))).convert("RGBA")).astype(int)
    rows, columns = image.shape[0] // drawn.rows, image.shape[1] // drawn.columns
    return image[rows // 2 :: rows, columns // 2 :: columns]


def hue(pixel: np.ndarray) -> str:
    """The kind of a pixel by its colour."""
    red, _, blue, alpha = pixel
    return "unseen" if alpha == 0 else "chosen" if blue > red + 20 else "missed" if red > blue + 20 else "left out"


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (128, 512)])
def test_another_reader_sees_the_same_pixels(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    indices = generator.integers(0, 4, shape).astype(np.uint8)
    palette = ["#000000", "#ff0000", "#010203", "#09c81e"]
    read = np.asarray(Image.open(io.BytesIO(png(indices, palette))).convert("RGBA"))
    assert (read[..., :3] == np.array([list(bytes.fromhex(colour[1:])) for colour in palette])[indices]).all()
    assert (read[..., 3] == np.where(indices == 0, 0, 255)).all()


def test_a_pixel_tells_what_was_chosen_missed_left_out_and_not_seen() -> None:
    assert [[hue(pixel) for pixel in row] for row in pixels(made())] == [
        ["chosen", "unseen", "unseen"],
        ["chosen", "missed", "unseen"],
        ["missed", "left out", "chosen"],
    ]


def test_more_attention_is_darker_within_each_kind() -> None:
    levels = np.geomspace(0.01, 100, 20)
    for chosen, threshold in ((True, 1.0), (False, 99.0), (False, 0.01)):
        drawn = made(levels[None], np.full((1, 20), chosen), threshold)
        lightness = pixels(drawn)[0, :19, :3].sum(axis=1)
        assert (np.diff(lightness) < 0).all()


def test_the_alternative_text_and_the_legend_give_the_shares() -> None:
    drawn = made()
    assert drawn.alt.startswith("Of the blocks that queries see, 50.0 % are chosen and hold 76.2 % of the attention")
    assert "2 of at least 1 % of its row are missed, which hold 23.8 %" in drawn.alt
    assert drawn.ramps[1].name == "chosen: 50.0 % of blocks, 76.2 % of attention"


def test_the_drawing_holds_the_image_axes_ticks_and_note() -> None:
    drawn = made()
    root = ElementTree.fromstring(picture.render(drawn))
    image = next(root.iter("{http://www.w3.org/2000/svg}image"))
    assert image.attrib["href"] == f"data:image/png;base64,{drawn.png}"
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Chosen", "position (tokens)", "50", "150", "one prompt", "not chosen"} <= set(texts)


def test_a_legend_that_is_too_long_for_a_line_goes_on_in_the_next() -> None:
    unit = "% of its row, which is a tile of 64 queries"
    drawn = dataclasses.replace(
        made(), ramps=tuple(Ramp(f"{i} {unit} {unit}", ("#000000", "#ffffff")) for i in range(3))
    )
    root = ElementTree.fromstring(picture.render(drawn))
    names = [text for text in root.iter("{http://www.w3.org/2000/svg}text") if (text.text or "").endswith(unit)]
    assert len({text.attrib["y"] for text in names}) == 3 and len({text.attrib["x"] for text in names}) == 1


def test_a_large_picture_is_compact() -> None:
    generator = np.random.default_rng(0)
    attention = 10 ** generator.uniform(-2, 2, (128, 512))
    assert len(made(attention, attention > 30).png) < 200_000


@pytest.mark.parametrize(
    ("attention", "chosen", "threshold", "message"),
    [
        (ATTENTION, CHOSEN[:2], 1.0, r"both are \[queries, keys\]"),
        (ATTENTION[0], CHOSEN[0], 1.0, r"both are \[queries, keys\]"),
        (ATTENTION[:0], CHOSEN[:0], 1.0, r"both are \[queries, keys\]"),
        (ATTENTION, CHOSEN, 0.001, "threshold 0.001 on a scale of 0.01 to 100"),
        (ATTENTION, CHOSEN, 100.0, "threshold 100"),
    ],
)
def test_what_does_not_fit_is_refused(
    attention: np.ndarray, chosen: np.ndarray, threshold: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        made(attention, chosen, threshold)


def test_a_scale_that_begins_at_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot begin at 0"):
        dataclasses.replace(made(), scale=dataclasses.replace(SCALE, low=0.0))


def test_an_axis_without_a_range_is_refused() -> None:
    with pytest.raises(ValueError, match="'keys' needs a low and a higher high"):
        attention_picture(
            "t", ATTENTION, CHOSEN, x=Axis("keys"), y=Axis("y", low=0, high=1), scale=SCALE, threshold=1.0
        )
