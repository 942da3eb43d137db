"""The report's schema survives JSON, its writers say what it holds, and what is not known is never 0."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import xml.etree.ElementTree as ElementTree

import pytest

from edgerun import drawing, line_chart, report, report_html
from edgerun.errors import EdgerunError
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
    Ramp,
    Report,
    Series,
    Step,
    Table,
)

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
HEAT_MAP = HeatMap(
    "dense",
    Categories("length", "tokens", ("1,024", "2,048")),
    Categories("depth", "%", ("0", "50", "100")),
    ((100.0, 97.0), (87.5, None), (0.0, 41.0)),
    "%",
    0.0,
    100.0,
    note="20 samples a cell",
    group="needle",
)
TOKENS = Axis("position", "tokens", low=0.0, high=64.0)
PICTURE = Picture(
    "Chosen blocks",
    TOKENS,
    TOKENS,
    4,
    8,
    "iVBORw0KGgo=",
    "12 % are chosen",
    Axis("attention", "%", log=True, low=0.01, high=10.0),
    (Ramp("chosen", ("#ffffff", "#0f437f")), Ramp("missed", ("#ff9b3f", "#8f2405"), 1.0)),
)
CLIP = MovingPicture("plain", "UklGRg==", "iVBORw0KGgo=", 51, 48, 48, 17.0, "a <red> circle", "30 steps", "a prompt")
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
    verdict="Sparse answers as dense does.",
    heat_maps=(HEAT_MAP,),
    pictures=(PICTURE,),
    clips=(CLIP,),
)


def test_json_gives_the_same_report_back() -> None:
    assert Report.from_json(json.loads(json.dumps(REPORT.to_json()))) == REPORT


def test_one_failed_check_fails_the_report() -> None:
    assert not REPORT.passed
    assert dataclasses.replace(REPORT, checks=REPORT.checks[:1]).passed
    assert dataclasses.replace(REPORT, checks=()).passed


def test_a_future_schema_is_refused_with_all_versions() -> None:
    with pytest.raises(EdgerunError, match=r"schema 99.*reads 1, 2, 3:"):
        Report.from_json({**REPORT.to_json(), "schema_version": 99})


def test_a_report_of_the_first_schema_is_read() -> None:
    values = {**REPORT.to_json(), "schema_version": 1}
    for later in ("verdict", "heat_maps", "pictures", "clips"):
        del values[later]
    for plot in values["plots"]:
        del plot["x"]["base"], plot["y"]["base"]
    older = dataclasses.replace(REPORT, verdict="", heat_maps=(), pictures=(), clips=())
    assert Report.from_json(values) == older


def test_the_published_reports_are_read() -> None:
    results = pathlib.Path(__file__).resolve().parents[1] / "bench" / "results"
    read = Report.from_json(json.loads((results / "demo.json").read_text(encoding="utf-8")))
    assert read.kind == "demo" and read.plots


@pytest.mark.parametrize(
    "damage",
    [
        {"steps": None},
        {"kind": 3},
        {"colour": "red"},
        {"steps": [{"name": "export"}]},
        {"machine": []},
        {"heat_maps": [{**HEAT_MAP.__dict__, "values": [[1.0, 2.0]]}]},
    ],
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


def test_text_has_the_verdict_below_the_title_and_before_all_else() -> None:
    assert report.to_text(REPORT).startswith("A <title> & more\n\nSparse answers as dense does.\n\n")


def test_text_has_a_heat_map_as_a_table_with_a_dash_for_what_was_not_measured() -> None:
    lines = report.to_text(REPORT).splitlines()
    first = lines.index("needle: dense (%)")
    assert [line.split() for line in lines[first + 1 : first + 6 : 2]] == [
        ["depth,", "%", "↓", "length,", "tokens", "→", "1,024", "2,048"],
        ["0", "100", "97"],
        ["100", "0", "41"],
    ]
    assert lines[first + 4].split() == ["50", "88", "–"]


def test_text_says_what_a_picture_shows() -> None:
    assert "Chosen blocks (a picture, on the HTML page): 12 % are chosen" in report.to_text(REPORT).splitlines()


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
    assert page.count('src="data:image/') == 2  # the clip's: what it shows is in the page itself
    page = page.replace('src="data:image/', "").replace('xmlns="http://www.w3.org/2000/svg"', "")
    for part in ("<script", "http://", "https://", "url(", "@import", "src="):
        assert part not in page, part


def test_html_escapes_what_it_prints() -> None:
    assert "A &lt;title&gt; &amp; more" in report_html.to_html(REPORT)


def test_html_has_the_verdict_before_facts_and_drawings() -> None:
    page = report_html.to_html(REPORT)
    assert page.index("<h1>") < page.index("Sparse answers as dense does.") < page.index("<dl>") < page.index("<svg")


def test_html_puts_maps_of_one_group_side_by_side_on_one_scale() -> None:
    other = dataclasses.replace(HEAT_MAP, title="sparse", high=200.0, values=((200.0, 0.0),) * 3)
    alone = dataclasses.replace(HEAT_MAP, title="alone", group="")
    page = report_html.to_html(dataclasses.replace(REPORT, heat_maps=(HEAT_MAP, alone, other)))
    group = page[page.index("needle</h3>") : page.index('aria-label="alone"')]
    assert group.count("</svg>") == 2 and group.count(">200 %<") == 2
    assert page.count(">100 %<") == 1


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


def marks(look: int) -> tuple[str, str]:
    """Colour and shape of a chart's only series, when its name is the one of this place."""
    names = [f"s{i}" for i in range(look + 1)]
    chart = line_chart.render(Plot("p", Axis("x"), Axis("y"), (Series(names[-1], ((0.0, Estimate(1.0)),)),)), names)
    mark = next(group for group in ElementTree.fromstring(chart).iter() if group.get("class") == "mark")
    shape = mark[-1]
    steps = shape.get("d", "").lstrip("M0123456789.- ")
    return mark.attrib["style"], f"{shape.tag} {steps} {shape.get('width')}"


def test_nine_series_have_nine_colours_and_nine_marks() -> None:
    colours, shapes = zip(*(marks(look) for look in range(9)), strict=True)
    assert len(set(colours)) == len(set(shapes)) == 9
    chart = line_chart.render(PLOT)
    assert all(chart.count(f"--c{i}:") == 2 for i in range(9))  # light and dark


def test_error_bars_at_one_place_stand_apart_and_others_stay() -> None:
    def near(x: float) -> Series:
        return Series(f"at {x}", ((x, Estimate(50.0, 40.0, 60.0)), (90.0 + x / 100, Estimate(50.0, 40.0, 60.0))))

    series = (*(near(10.0) for _ in range(3)), near(30.0), Series("no bars", ((10.0, Estimate(50.0)),)))
    root = ElementTree.fromstring(line_chart.render(Plot("p", Axis("x", low=0, high=100), Axis("y"), series)))
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    first = [float(line.attrib["points"].split(",")[0]) for line in lines]
    assert first[1] == first[4] and [first[1] - first[0], first[2] - first[1]] == pytest.approx([3.0, 3.0])
    assert (first[3] - first[1]) / (line_chart.WIDTH - 92) == pytest.approx(0.2, abs=1e-3)


def test_a_long_legend_wraps_and_makes_the_chart_higher() -> None:
    series = tuple(Series(f"a selector with a long name, {i}", ((1.0, Estimate(1.0, n=200)),)) for i in range(9))
    root = ElementTree.fromstring(line_chart.render(Plot("p", Axis("x"), Axis("y"), series)))
    names = [text for text in root.iter() if (text.text or "").startswith("a selector") and "y" in text.attrib]
    assert len({text.attrib["y"] for text in names}) >= 5
    assert float(root.attrib["viewBox"].split()[3]) >= line_chart.HEIGHT + 66


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((3.1, 48.0), (2, 5, 10, 20, 50)),
        ((0.004, 0.005), (0.002, 0.005)),
        ((1e-4, 10.0), (1e-4, 1e-3, 1e-2, 0.1, 1, 10)),
    ],
)
def test_a_decimal_log_axis_has_ticks_at_one_two_and_five(
    values: tuple[float, float], expected: tuple[float, ...]
) -> None:
    found, low, high = drawing.ticks(Axis("density", "%", log=True, base=10), values, from_zero=False)
    assert tuple(found) == expected and (low, high) == (expected[0], expected[-1])


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
