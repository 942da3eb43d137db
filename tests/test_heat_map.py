"""Heat maps: colours in order, numbers where they can be read, and what was not measured is said."""

from __future__ import annotations

import dataclasses
import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest

from edgerun import heat_map
from edgerun.report import Categories, HeatMap

SVG = "{http://www.w3.org/2000/svg}"


def made(rows: int, columns: int, value: float | None = 50.0) -> HeatMap:
    """A map of one value."""
    x, y = (Categories(name, "", tuple(str(i) for i in range(n))) for name, n in (("x", columns), ("y", rows)))
    return HeatMap("a map", x, y, ((value,) * columns,) * rows, "%", 0.0, 100.0)


def cells(drawn: str) -> list[ElementTree.Element]:
    """Rectangles that say on hover what they are."""
    return [box for box in ElementTree.fromstring(drawn).iter(f"{SVG}rect") if box.find(f"{SVG}title") is not None]


def numbers(drawn: str) -> list[str]:
    """What is printed inside cells."""
    return [
        text.text or "" for text in ElementTree.fromstring(drawn).iter(f"{SVG}text") if "cell" in text.attrib["class"]
    ]


def test_lightness_rises_over_the_whole_scale() -> None:
    def lightness(colour: str) -> float:
        return sum(w * int(colour[i : i + 2], 16) ** 2.2 for w, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5)))

    found = [lightness(heat_map.colour_of(i / 100)) for i in range(101)]
    assert all(a < b for a, b in itertools.pairwise(found))


def test_a_value_beyond_the_scale_has_the_colour_of_its_end() -> None:
    assert heat_map.colour_of(-1.0) == heat_map.colour_of(0.0) and heat_map.colour_of(2.0) == heat_map.colour_of(1.0)


def test_every_cell_says_its_place_and_value() -> None:
    drawn = heat_map.render(dataclasses.replace(made(2, 2), values=((1.0, 2.0), (3.0, 4.0))))
    assert [box.findtext(f"{SVG}title") for box in cells(drawn)] == [
        "y 0, x 0: 1 %",
        "y 0, x 1: 2 %",
        "y 1, x 0: 3 %",
        "y 1, x 1: 4 %",
    ]
    assert numbers(drawn) == ["1", "2", "3", "4"]


@pytest.mark.parametrize(("rows", "columns", "printed"), [(20, 20, True), (28, 32, False), (2, 100, False)])
def test_numbers_are_printed_only_where_they_can_be_read(rows: int, columns: int, printed: bool) -> None:
    drawn = heat_map.render(made(rows, columns))
    assert len(cells(drawn)) == rows * columns and bool(numbers(drawn)) == printed


def test_what_was_not_measured_is_blank_and_said() -> None:
    drawn = heat_map.render(dataclasses.replace(made(1, 2), values=((50.0, None),)))
    assert [box.get("class") for box in cells(drawn)] == [None, "blank"]
    assert "not measured" in [text.text for text in ElementTree.fromstring(drawn).iter(f"{SVG}text")]
    assert "not measured" not in heat_map.render(made(1, 2))


def test_axes_title_note_and_scale_are_named() -> None:
    x, y = Categories("length", "tokens", ("1,024",)), Categories("depth", "%", ("half",))
    drawn = heat_map.render(HeatMap("Needle & thread", x, y, ((0.5,),), "s", 0.25, 0.75, note="3 samples"))
    texts = [text.text for text in ElementTree.fromstring(drawn).iter(f"{SVG}text")]
    expected = {"Needle & thread", "length (tokens)", "depth (%)", "1,024", "half", "0.250", "0.750 s", "3 samples"}
    assert expected <= set(texts)


def test_long_ticks_turn_and_many_are_thinned() -> None:
    names = tuple(f"a long selector {i}" for i in range(9))
    turned = heat_map.render(dataclasses.replace(made(2, 9), x=Categories("selector", "", names)))
    assert all(re.search(rf"rotate\(-40 [^>]*>{name}<", turned) for name in names)
    many = heat_map.render(made(2, 100))
    shown = [text.text for text in ElementTree.fromstring(many).iter(f"{SVG}text") if (text.text or "").isdigit()]
    assert 10 < len(shown) < 60


def test_a_group_has_one_scale_that_spans_its_maps() -> None:
    first, second = (
        dataclasses.replace(made(1, 1), group="g", low=low, high=high) for low, high in ((0, 50), (-5, 20))
    )
    assert heat_map.scales_of((first, second, made(1, 1))) == {"g": (-5, 50)}


def test_a_group_of_two_units_is_refused() -> None:
    first = dataclasses.replace(made(1, 1), group="g")
    with pytest.raises(ValueError, match=r"'%' and 's': one scale has one unit"):
        heat_map.scales_of((first, dataclasses.replace(first, unit="s")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": ((1.0, 2.0),)}, r"1 rows of \[2\] values for 2 and 2 ticks"),
        ({"values": ((1.0, 2.0), (3.0,))}, r"2 rows of \[1, 2\] values"),
        ({"low": 100.0}, "low must be lower"),
        ({"high": float("nan")}, "low must be lower"),
        ({"x": Categories("x", "", ())}, "no value: leave it out"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(made(2, 2), **change)
