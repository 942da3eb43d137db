"""A page in a real browser: its picture, its complaints, its measures."""

from __future__ import annotations

import html
import io
import json
import pathlib
import re
import shutil
import subprocess
from typing import Any

import pytest
from PIL import Image

NARROW, WIDE = 390, 1200
TIMEOUT_S = 120
# For every frame: its width, its content's, how many pictures it has and how many of them are broken, texts that leave
# their drawing, and level texts of a drawing that overlap.
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
  const root = page.documentElement, pictures = [...page.querySelectorAll("img")];
  found.push({width: root.clientWidth, needed: root.scrollWidth, drawings: page.querySelectorAll("svg").length,
              pictures: pictures.length, broken: pictures.filter((one) => !one.complete || !one.naturalWidth).length,
              outside, overlapping});
}
document.body.textContent = "<measured>" + JSON.stringify(found) + "</measured>";
"""
# For every film: its frames that differ from the one before, and when the last of them begins, in ms.
# Virtual time passes at once while only a decoder works: ticks hold it up.
FILMS = """
(async () => {
  const found = [], ticks = setInterval(() => {}, 1);
  for (const film of document.querySelectorAll("img.film")) {
    const bytes = Uint8Array.from(atob(film.src.split(",")[1]), (letter) => letter.charCodeAt(0));
    const decoder = new ImageDecoder({data: bytes, type: "image/webp"});
    await decoder.tracks.ready;
    await decoder.completed;
    const frames = decoder.tracks.selectedTrack.frameCount;
    const {image} = await decoder.decode({frameIndex: frames - 1});
    found.push([frames, image.timestamp / 1000]);
  }
  clearInterval(ticks);
  document.body.textContent = "<measured>" + JSON.stringify(found) + "</measured>";
})().catch((error) => { document.body.textContent = String(error); });
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
    return _told(browse(chromium, wrapper, folder, "--dump-dom")[0])


def films(chromium: str, page: str, folder: pathlib.Path) -> list[tuple[int, float]]:
    """What FILMS finds of a page: a headless picture has a film's first frame only. The page may not forbid scripts."""
    script = f"<script>window.onload=()=>{{{FILMS}}}</script>"
    return _told(browse(chromium, page + script, folder, "--dump-dom", "--virtual-time-budget=1000000")[0])


def _told(document: str) -> list[Any]:
    found = re.search("&lt;measured&gt;(.*)&lt;/measured&gt;", document, re.DOTALL)
    assert found is not None, document[-2000:]
    return list(json.loads(html.unescape(found[1])))
