"""A report's page in a real browser: it complains of nothing, fits a phone, keeps its labels apart, has a dark side."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

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

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "bench" / "results"
NARROW, WIDE = 390, 1200
GREEN = (0, 137, 0)
PAPER, DARK_PAPER = (255, 255, 255), (13, 17, 23)
TIMEOUT_S = 120
# For every frame: its width, its content's, texts that leave their drawing, and level texts of a drawing that overlap.
MEASURE = """
const found = [];
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, outside = [], overlapping = [];
  for (const svg of page.querySelectorAll("svg")) {
    const whole = svg.getBoundingClientRect(), level = [];
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (box.left < whole.left || box.right > whole.right || box.top < whole.top || box.bottom > whole.bottom)
        outside.push(text.textContent);
      if (text.hasAttribute("transform")) continue;
      for (const [name, other] of level)
        if (Math.min(box.right, other.right) - Math.max(box.left, other.left) > 0.5 &&
            Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top) > 3)
          overlapping.push(name + " | " + text.textContent);
      level.push([text.textContent, box]);
    }
  }
  const root = page.documentElement;
  found.push({width: root.clientWidth, needed: root.scrollWidth, drawings: page.querySelectorAll("svg").length,
              outside, overlapping});
}
document.body.textContent = "<measured>" + JSON.stringify(found) + "</measured>";
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser's path; skipped without one that runs: Ubuntu's command may only say to install a snap."""
    for path in filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        if subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    pytest.skip("no chromium, chromium-browser or google-chrome runs here: apt install chromium")


def browse(chromium: str, page: str, folder: pathlib.Path, *options: str) -> tuple[str, list[str]]:
    """Open a page: what the browser prints, and the lines that the page put on the console."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    fixed = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", "--v=0")
    command = [chromium, *fixed, f"--user-data-dir={folder / 'profile'}", *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def screenshot(chromium: str, page: str, folder: pathlib.Path, *options: str) -> tuple[Image.Image, list[str]]:
    """A page as a picture of WIDE by 3000 pixels, and what it put on the console."""
    size = (f"--window-size={WIDE},3000", f"--screenshot={folder / 'page.png'}")
    _, complaints = browse(chromium, page, folder, *size, *options)
    return Image.open(io.BytesIO((folder / "page.png").read_bytes())).convert("RGB"), complaints


def measured(chromium: str, page: str, folder: pathlib.Path) -> list[dict[str, object]]:
    """What MEASURE finds of a page on a phone and on a desk. The script is the frame's, the page has none.

    The page is inside frames because a headless window cannot be as narrow as a phone.
    """
    source = html.escape(page, quote=True)
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{source}"></iframe>' for width in (NARROW, WIDE))
    wrapper = f"<!doctype html><meta charset='utf-8'><body>{frames}<script>window.onload=()=>{{{MEASURE}}}</script>"
    document, _ = browse(chromium, wrapper, folder, "--dump-dom")
    found = re.search("&lt;measured&gt;(.*)&lt;/measured&gt;", document, re.DOTALL)
    assert found is not None, document[:2000]
    return list(json.loads(html.unescape(found[1])))


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


def test_the_page_fits_a_phone_and_a_desk(chromium: str, page: str, tmp_path: pathlib.Path) -> None:
    found = measured(chromium, page, tmp_path)
    assert [frame["width"] for frame in found] == [NARROW, WIDE]
    for frame in found:
        assert frame["drawings"] == 8
        assert frame["needed"] == frame["width"]
        assert frame["outside"] == [] and frame["overlapping"] == []


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.html")), ids=lambda path: path.stem)
def test_published_pages_are_drawn_and_fit(chromium: str, tmp_path: pathlib.Path, path: pathlib.Path) -> None:
    published = path.read_text(encoding="utf-8")
    image, complaints = screenshot(chromium, published, tmp_path)
    assert complaints == [] and len(image.getcolors(maxcolors=image.width * image.height)) > 1000
    for frame in measured(chromium, published, tmp_path):
        assert frame["needed"] == frame["width"] and frame["outside"] == [] and frame["overlapping"] == []


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
