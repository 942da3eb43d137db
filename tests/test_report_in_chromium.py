"""A report's page in a real browser: it complains of nothing, fits a phone, keeps its labels apart, has a dark side."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re

import numpy as np
import pytest

from edgerun.attention_picture import attention_picture
from edgerun.clip_picture import moving_picture
from edgerun.report import (
    Axis,
    Categories,
    Check,
    Column,
    Estimate,
    HeatMap,
    Machine,
    MovingPicture,
    Picture,
    Plot,
    Report,
    Series,
    Step,
    Table,
)
from edgerun.report_html import to_html
from tests.browser import NARROW, WIDE, chromium, films, measured, screenshot

__all__ = ["chromium"]  # a fixture

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "bench" / "results"
GREEN = (0, 137, 0)
PAPER, DARK_PAPER = (255, 255, 255), (13, 17, 23)


def line(rank: int) -> Series:
    """A selector's right answers by density."""
    points = []
    for density in (3.0, 6.0, 12.0, 25.0, 50.0):
        right = 100 / (1 + math.exp(1.4 * (1 + 0.45 * rank - math.log2(density))))
        points.append((density, Estimate(right, max(0.0, right - 6), min(100.0, right + 5), n=200)))
    return Series(f"selector number {rank}", tuple(points))


def heat_map(title: str, rows: int, columns: int, group: str = "") -> HeatMap:
    """Values of all the scale, one of them not measured."""
    values = [[100.0 * ((i * columns + j) % 17) / 16 for j in range(columns)] for i in range(rows)]
    lengths = tuple(f"{1024 * (j + 1):,}" for j in range(columns))
    depths = tuple(f"{100 * i / rows:.0f}" for i in range(rows))
    measured_values = tuple(
        tuple(None if i == j == 1 else v for j, v in enumerate(row)) for i, row in enumerate(values)
    )
    axes = (Categories("length", "tokens", lengths), Categories("depth", "%", depths))
    return HeatMap(title, *axes, measured_values, "%", 0.0, 100.0, note="20 samples a cell " * 8, group=group)


def picture() -> Picture:
    """128 tiles by 512 blocks, causal."""
    generator = np.random.default_rng(0)
    attention = 10 ** generator.uniform(-2, 1, (128, 512))
    attention[np.arange(512)[None] > 4 * np.arange(128)[:, None] + 3] = np.nan
    tokens = Axis("position", "tokens", low=0.0, high=8192.0)
    scale = Axis("attention of a block", "% of its row", log=True, low=0.01, high=10.0)
    note = "A row is a tile of 64 queries, a column a micro-block of 16 keys. " * 3
    title = "Blocks chosen for one prompt over the oracle's attention"
    chosen = attention > generator.uniform(0, 9, attention.shape)
    return attention_picture(title, attention, chosen, x=tokens, y=tokens, scale=scale, threshold=5.0, note=note)


def clip(title: str, group: str = "") -> MovingPicture:
    """A red square that moves over green."""
    frames = np.zeros((51, 48, 48, 3), np.uint8)
    frames[..., 1] = GREEN[1]
    for i, frame in enumerate(frames):
        frame[20:30, i // 2 : i // 2 + 10] = (200, 0, 0)
    return moving_picture(title, frames, 17.0, alt="a red square moves right", group=group, note="30 evaluations " * 4)


@pytest.fixture(scope="module")
def page() -> str:
    """The page of a report with everything a report can have."""
    density = Axis("causal density", "%", log=True, base=10)
    dense = Series("dense", ((3.0, Estimate(98.0)), (50.0, Estimate(98.0))), dashed=True)
    right = Axis("right answers", "%", low=0, high=100)
    plot = Plot(
        "Right answers against causal density: a task of a long name, 8,192 tokens",
        density,
        right,
        (dense, *(line(rank) for rank in range(8))),
        note="Wilson 95 % intervals; every line answers the same samples. Density: attended of all causal pairs.",
    )
    linear = dataclasses.replace(plot, title="The same on a linear axis", x=Axis("causal density", "%", low=0))
    columns = (Column("contender"), *(Column(f"measure {i}", "s", 2) for i in range(9)))
    selectors = tuple(f"selector number {i}" for i in range(9))
    by_selector = dataclasses.replace(heat_map("By selector", 7, 9), x=Categories("selector", "", selectors))
    report = Report(
        kind="eval",
        title="A report of everything",
        created_utc="2026-11-20 12:00:00",
        command="edgerun eval zoo:text ruler --tasks niah_single_1,niah_multikey_2 --lengths 4096,8192",
        edgerun_version="0.1.0",
        machine=Machine("Linux", "x86_64", "a CPU", 2, 2**34, ("avx2",), {"torch": "2.13.0"}),
        facts=(("model", "zoo:text"), ("build", "0123456789abcdef" * 4)),
        tables=(Table("Answers", columns, (("dense", *(float(i) for i in range(9))),)),),
        plots=(plot, linear),
        checks=(Check("KL to eager", 1e-9, 1e-6, False, True),),
        steps=(Step("answers", 8.25),),
        verdict="Sparse attention answers as often as dense at an eighth of its cost; no baseline does.",
        heat_maps=(
            heat_map("dense", 11, 6, "needle"),
            heat_map("sparse", 11, 6, "needle"),
            by_selector,
            heat_map("20 by 20", 20, 20),
            heat_map("28 by 64", 28, 64),
        ),
        pictures=(picture(),),
        clips=(*(clip(f"method {i}", "a red square moves right") for i in range(3)), clip("alone")),
    )
    return to_html(report)


@pytest.mark.parametrize(("scheme", "paper"), [(1, PAPER), (0, DARK_PAPER)], ids=["light", "dark"])
def test_the_page_is_drawn_without_a_complaint(
    chromium: str, page: str, tmp_path: pathlib.Path, scheme: int, paper: tuple[int, int, int]
) -> None:
    image, complaints = screenshot(chromium, page, tmp_path, f"--blink-settings=preferredColorScheme={scheme}")
    assert complaints == []
    assert image.size == (WIDE, 3000) and image.getpixel((2, 2)) == paper
    assert len(image.getcolors(maxcolors=image.width * image.height)) > 1000


def test_clips_are_shown(chromium: str, page: str, tmp_path: pathlib.Path) -> None:
    """Each of the four in its animation and in its row of frames: nothing else on the page has their green."""
    image, _ = screenshot(chromium, page, tmp_path)
    colours = {colour: count for count, colour in image.getcolors(maxcolors=image.width * image.height)}
    assert colours[GREEN] > 4 * 150 * 150


def test_clips_move(chromium: str, page: str, tmp_path: pathlib.Path) -> None:
    """The square moves in every second frame; the last move is at 50/17 s."""
    assert films(chromium, page, tmp_path) == 4 * [[26, pytest.approx(50 / 17 * 1e3, abs=1)]]


def test_the_page_fits_a_phone_and_a_desk(chromium: str, page: str, tmp_path: pathlib.Path) -> None:
    found = measured(chromium, page, tmp_path)
    assert [frame["width"] for frame in found] == [NARROW, WIDE]
    for frame in found:
        assert frame["drawings"] == 8
        assert frame["needed"] == frame["width"]
        assert frame["outside"] == [] and frame["overlapping"] == []
        assert frame["pictures"] == page.count("<img") and frame["broken"] == 0


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.html")), ids=lambda path: path.stem)
def test_published_pages_are_drawn_and_fit(chromium: str, tmp_path: pathlib.Path, path: pathlib.Path) -> None:
    published = path.read_text(encoding="utf-8")
    image, complaints = screenshot(chromium, published, tmp_path)
    assert complaints == [] and len(image.getcolors(maxcolors=image.width * image.height)) > 1000
    for frame in measured(chromium, published, tmp_path):
        assert frame["needed"] == frame["width"] and frame["outside"] == [] and frame["overlapping"] == []
        assert frame["pictures"] == published.count("<img") and frame["broken"] == 0
    assert all(frames > 1 for frames, _ in films(chromium, published, tmp_path))


def test_a_page_with_a_broken_picture_is_noticed(chromium: str, page: str, tmp_path: pathlib.Path) -> None:
    cut = re.sub(r'(data:image/webp;base64,.{40})[^"]*', r"\1", page, count=1)
    for frame in measured(chromium, cut, tmp_path):
        assert frame["pictures"] == page.count("<img") and frame["broken"] == 1


def test_a_page_that_complains_is_noticed(chromium: str, tmp_path: pathlib.Path) -> None:
    bad = "<!doctype html><script>console.error('it is broken')</script><p>broken"
    image, complaints = screenshot(chromium, bad, tmp_path)
    assert len(complaints) == 1 and "it is broken" in complaints[0]
    assert len(image.getcolors(maxcolors=image.width * image.height)) < 300


def test_a_page_that_does_not_fit_is_noticed(chromium: str, tmp_path: pathlib.Path) -> None:
    texts = '<text x="1" y="20">one</text><text x="9" y="22">two</text><text x="99" y="20">outside</text>'
    bad = f'<!doctype html><div style="width:900px">wide</div><svg width="100" height="40">{texts}</svg>'
    narrow, wide = measured(chromium, bad, tmp_path)
    assert narrow["needed"] > NARROW and wide["needed"] == WIDE
    assert narrow["outside"] == ["outside"] and narrow["overlapping"] == ["one | two"]
