"""The report's schema survives JSON, its writers say what it holds, and what is not known is never 0."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import xml.etree.ElementTree as ElementTree

import pytest

from edgerun import line_chart, report, report_html
from edgerun.errors import EdgerunError
from edgerun.report import Axis, Check, Column, Estimate, Machine, Plot, Report, Series, Step, Table

MACHINE = Machine("Linux", "x86_64", "a CPU", 2, None, ("avx2",), {"torch": "2.13.0"})
TABLE = Table(
    "Two devices",
    (Column("device"), Column("right"), Column("prefill", "s", 2), Column("peak RSS", "MiB")),
    (("host", True, Estimate(3.875, sd=0.125, n=3), 210), ("emulated-arm64", False, None, 33)),
    note="emulated times say nothing",
)
PLOT = Plot(
    "Right answers against budget",
    Axis("budget", "tokens", log=True),
    Axis("right answers", "%", low=0, high=100),
    (
        Series("dense", ((512.0, Estimate(97.0, n=20)), (2048.0, Estimate(97.0, n=20))), dashed=True),
        Series("sparse", ((512.0, Estimate(60.0, 40.0, 80.0, n=20)), (2048.0, Estimate(96.0, 90.0, 98.0, n=20)))),
    ),
)
REPORT = Report(
    kind="demo",
    title="A <title> & more",
    created_utc="2026-11-20 12:00:00",
    command="edgerun demo",
    edgerun_version="0.1.0",
    machine=MACHINE,
    facts=(("model", "zoo:text"), ("layers", 6), ("unknown", None)),
    tables=(TABLE,),
    plots=(PLOT,),
    checks=(Check("KL", 1e-9, 1e-6, False, True), Check("top-1", 0.5, 0.98, True, False, "step 3")),
    steps=(Step("export", 8.25), Step("run", 1.75)),
    notes=("read on",),
)


def test_json_gives_the_same_report_back() -> None:
    assert Report.from_json(json.loads(json.dumps(REPORT.to_json()))) == REPORT


def test_one_failed_check_fails_the_report() -> None:
    assert not REPORT.passed
    assert dataclasses.replace(REPORT, checks=REPORT.checks[:1]).passed
    assert dataclasses.replace(REPORT, checks=()).passed


def test_a_future_schema_is_refused_with_both_versions() -> None:
    with pytest.raises(EdgerunError, match=r"schema 99.*reads 1"):
        Report.from_json({**REPORT.to_json(), "schema_version": 99})


@pytest.mark.parametrize(
    "damage", [{"steps": None}, {"kind": 3}, {"colour": "red"}, {"steps": [{"name": "export"}]}, {"machine": []}]
)
def test_a_damaged_report_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(EdgerunError, match="not an edgerun report"):
        Report.from_json({**REPORT.to_json(), **damage})


def test_values_that_are_not_finite_become_unknown() -> None:
    values = dataclasses.replace(REPORT, checks=(Check("KL", float("inf"), 1.0, False, False),)).to_json()
    assert values["checks"][0]["measured"] is None


def test_text_has_units_spread_and_a_dash_for_the_unknown() -> None:
    lines = report.to_text(REPORT).splitlines()
    host = next(line for line in lines if line.startswith("  host"))
    assert "3.88 ± 0.12" in host and "yes" in host
    emulated = next(line for line in lines if "emulated-arm64" in line)
    assert emulated.split() == ["emulated-arm64", "no", "–", "33"]
    assert any("prefill, s" in line and "peak RSS, MiB" in line for line in lines)


def test_text_says_which_check_failed_and_its_limit() -> None:
    assert "FAIL  top-1: 0.5 (at least 0.98); step 3" in report.to_text(REPORT)


def test_text_adds_up_the_times() -> None:
    assert report.to_text(REPORT).split("total")[1].split()[0] == "10.0"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1e-7, "1.00e-07"), (0.125, "0.125"), (8192, "8,192"), (float("nan"), "–"), (None, "–")],
)
def test_numbers_for_people(value: float | None, text: str) -> None:
    assert report.format_number(value) == text


def test_html_is_one_file_that_loads_nothing() -> None:
    page = report_html.to_html(REPORT)
    for part in ("<script", "http://", "https://", "url(", "@import", "src="):
        assert part not in page.replace('xmlns="http://www.w3.org/2000/svg"', ""), part


def test_html_escapes_what_it_prints() -> None:
    assert "A &lt;title&gt; &amp; more" in report_html.to_html(REPORT)


def test_chart_is_well_formed_with_one_line_and_marks_for_each_series() -> None:
    namespace = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(line_chart.render(PLOT))
    assert len(root.findall(f"{namespace}polyline")) == 2
    titles = [title.text for title in root.iter(f"{namespace}title")]
    assert "sparse: 512 → 60, n = 20" in titles and len(titles) == 4


def test_chart_puts_larger_values_higher_and_inside_the_frame() -> None:
    root = ElementTree.fromstring(line_chart.render(PLOT))
    line = root.findall("{http://www.w3.org/2000/svg}polyline")[1]
    (x1, y1), (x2, y2) = (tuple(map(float, point.split(","))) for point in line.attrib["points"].split())
    assert 0 < x1 < x2 < line_chart.WIDTH and 0 < y2 < y1 < line_chart.HEIGHT


def test_a_name_has_one_colour_in_all_plots_of_a_page() -> None:
    first, second = PLOT.series
    other = dataclasses.replace(PLOT, series=(second,))
    names = line_chart.names_of((PLOT, other))
    assert names == (first.name, second.name)
    assert "stroke:var(--c1)" in line_chart.render(other, names)
    assert "stroke:var(--c1)" not in line_chart.render(other)


def test_chart_names_axes_with_units_and_prints_n() -> None:
    text = line_chart.render(PLOT)
    for label in ("budget (tokens)", "right answers (%)", "sparse (n = 20)"):
        assert label in text


@pytest.mark.parametrize("values", [(0.0, 0.0), (5.0, 5.0), (1e-6, 3e-6), (-2.0, 7.0), (1.0, 1e9)])
def test_chart_of_any_range_has_ticks_inside_it(values: tuple[float, float]) -> None:
    points = tuple((float(i), Estimate(v)) for i, v in enumerate(values))
    ElementTree.fromstring(line_chart.render(Plot("p", Axis("x"), Axis("y"), (Series("s", points),))))


def test_an_empty_plot_is_refused() -> None:
    with pytest.raises(ValueError, match="no point"):
        line_chart.render(Plot("p", Axis("x"), Axis("y"), (Series("s", ()),)))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "report.json"
    report.write_json(REPORT, path)
    assert Report.from_json(json.loads(path.read_text())) == REPORT
    before = path.read_text()
    with pytest.raises(UnicodeEncodeError):
        report.write_whole(path, "half \ud800")
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["report.json"]
