"""A report as one HTML page that needs nothing else: inline CSS and SVG, no script, light and dark, good on paper."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Sequence

from edgerun import heat_map, line_chart, picture
from edgerun.report import (
    Check,
    HeatMap,
    MovingPicture,
    Report,
    Step,
    Table,
    column_heading,
    describe_check,
    format_cell,
    is_text_column,
    write_whole,
)

_STYLE = """
:root{color-scheme:light dark;--ink:#1f2328;--soft:#57606a;--line:#d8dee4;--paper:#fff;--panel:#f6f8fa;
--good:#1a7f37;--bad:#cf222e}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9aa4af;--line:#30363d;--paper:#0d1117;--panel:#161b22;
--good:#56d364;--bad:#ff7b72}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 24px 56px}h1{font-size:26px;line-height:1.25;margin:0 0 4px}
h2{font-size:18px;margin:36px 0 10px}p{margin:6px 0}.soft,.note,footer{color:var(--soft)}.note{font-size:13.5px}
code{font:13px ui-monospace,SFMono-Regular,"DejaVu Sans Mono",monospace;background:var(--panel);padding:2px 6px;
border-radius:5px;overflow-wrap:anywhere}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:13px;vertical-align:bottom;white-space:normal}.left{text-align:left}
tbody tr:last-child td{border-bottom:0}.panel{border:1px solid var(--line);border-radius:10px;padding:4px 6px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(480px,100%),1fr));gap:16px}
.plots .panel,.picture{padding:10px}svg{display:block;width:100%;height:auto;margin:0 auto}
.plots+.plots{margin-top:36px}.plots .panel{overflow-x:auto}.plots svg{min-width:340px;max-width:720px}
.picture svg{min-width:760px}.picture+.picture{margin-top:16px}
.group{font-size:15px;margin:24px 0 8px}.verdict{font-size:17px;font-weight:700;margin:14px 0 10px;max-width:75ch}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;
margin:12px 0}dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}.good{color:var(--good);font-weight:600}
.bad{color:var(--bad);font-weight:600}
footer{margin-top:44px;border-top:1px solid var(--line);padding-top:12px;font-size:13px}
.clips{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(220px,100%),1fr));gap:16px}
figure{margin:0}.clip{padding:10px}figcaption{font-weight:600;font-size:14px;margin-bottom:8px}
.film,.sheet{display:block;width:100%;height:auto;image-rendering:pixelated;border:1px solid var(--line)}
.sheet{margin-top:6px}
@media(max-width:600px){main{padding:20px 12px 40px}.plots .panel{padding:4px 2px}}
@media print{.panel{break-inside:avoid}.plots svg,.picture svg{min-width:0}}
"""


def to_html(report: Report) -> str:
    """The whole page: verdict and facts, drawings, tables, checks and times; the command and the machine close it.

    Raises ValueError for a plot without a point or a group of heat maps of several units.
    """
    created = f"edgerun {report.edgerun_version} · {report.created_utc}"
    parts = [f"<h1>{_escape(report.title)}</h1><p class='soft'>{_escape(created)}</p>"]
    if report.verdict:
        parts.append(f"<p class='verdict'>{_escape(report.verdict)}</p>")
    if report.facts:
        items = "".join(
            f"<dt>{_escape(name)}</dt><dd>{_escape(format_cell(value))}</dd>" for name, value in report.facts
        )
        parts.append(f"<dl>{items}</dl>")
    parts += [f"<p>{_escape(note)}</p>" for note in report.notes]
    parts += [_table(table) for table in report.tables[:1]]
    if report.clips:
        parts += ["<h2>Clips</h2>", *_clips(report.clips)]
    if report.plots:
        names = line_chart.names_of(report.plots)
        figures = "".join(f'<div class="panel">{line_chart.render(plot, names)}</div>' for plot in report.plots)
        parts.append(f'<h2>Plots</h2><div class="plots">{figures}</div>')
    if report.heat_maps:
        parts += ["<h2>Heat maps</h2>", *_heat_maps(report.heat_maps)]
    if report.pictures:
        drawn = (f'<div class="panel scroll picture">{picture.render(entry)}</div>' for entry in report.pictures)
        parts += ["<h2>Pictures</h2>", *drawn]
    parts += [_table(table) for table in report.tables[1:]]
    if report.checks:
        parts.append("<h2>Checks</h2>" + _panel("".join(_check(check) for check in report.checks)))
    if report.steps:
        total = Step("total", sum(step.seconds for step in report.steps))
        rows = "".join(
            f'<tr><td class="left">{_escape(step.name)}</td><td>{step.seconds:.1f} s</td></tr>'
            for step in (*report.steps, total)
        )
        parts.append("<h2>Time</h2>" + _panel(rows))
    parts.append(_footer(report))
    title = _escape(report.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def write_html(report: Report, path: pathlib.Path) -> None:
    """Write the page, whole or not at all. Raises OSError when the place cannot be written."""
    write_whole(path, to_html(report))


def _heat_maps(heat_maps: Sequence[HeatMap]) -> list[str]:
    """Maps side by side, those of a group under its name and on its scale."""
    scales = heat_map.scales_of(heat_maps)
    parts = []
    for group in dict.fromkeys(entry.group for entry in heat_maps):
        members = (entry for entry in heat_maps if entry.group == group)
        drawn = "".join(f'<div class="panel">{heat_map.render(entry, scales.get(group))}</div>' for entry in members)
        parts.append(
            (f'<h3 class="group">{_escape(group)}</h3>' if group else "") + f'<div class="plots">{drawn}</div>'
        )
    return parts


def _clips(clips: Sequence[MovingPicture]) -> list[str]:
    """Clips of a group side by side under its name, each with its sheet of frames below."""
    parts = []
    for group in dict.fromkeys(clip.group for clip in clips):
        drawn = "".join(_clip(clip) for clip in clips if clip.group == group)
        parts.append(
            (f'<h3 class="group">{_escape(group)}</h3>' if group else "") + f'<div class="clips">{drawn}</div>'
        )
    return parts


def _clip(clip: MovingPicture) -> str:
    alt = _escape(clip.alt)
    size = f'width="{clip.width}" height="{clip.height}"'
    facts = f"{clip.frames} frames of {clip.height} × {clip.width}, {clip.fps:g} a second"
    return (
        f'<figure class="panel clip"><figcaption>{_escape(clip.title)}</figcaption>'
        f'<img class="film" {size} alt="{alt}" title="{_escape(facts)}" src="data:image/webp;base64,{clip.webp}">'
        f'<img class="sheet" alt="frames of it, from the first to the last" src="data:image/png;base64,{clip.png}">'
        + (f'<p class="note">{_escape(clip.note)}</p>' if clip.note else "")
        + "</figure>"
    )


def _table(table: Table) -> str:
    left = ["left" if is_text_column(table, i) else "" for i in range(len(table.columns))]
    heading = "".join(
        f'<th class="{side}">{_escape(column_heading(column))}</th>'
        for column, side in zip(table.columns, left, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td class="{side}">{_escape(format_cell(cell, column.digits))}</td>'
            for cell, column, side in zip(row, table.columns, left, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{_escape(table.note)}</p>' if table.note else ""
    title = f"<h2>{_escape(table.title)}</h2>" if table.title else ""
    return title + _panel(rows, heading) + note


def _panel(rows: str, heading: str = "") -> str:
    head = f"<thead><tr>{heading}</tr></thead>" if heading else ""
    return f'<div class="panel scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _check(check: Check) -> str:
    mark = '<span class="good">pass</span>' if check.passed else '<span class="bad">FAIL</span>'
    cells = (mark, _escape(check.name), _escape(describe_check(check)))
    return "<tr>" + "".join(f'<td class="left">{cell}</td>' for cell in cells) + "</tr>"


def _footer(report: Report) -> str:
    machine = report.machine
    memory = "" if machine.memory_bytes is None else f", {machine.memory_bytes / 2**30:.0f} GiB"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    features = f" ({', '.join(machine.features)})" if machine.features else ""
    where = f"{machine.cpu}{features}, {machine.cores} cores{memory}, {machine.system} {machine.machine}"
    lines = (f"Made by <code>{_escape(report.command)}</code>", _escape(where), _escape(versions))
    return "<footer>" + "".join(f"<p>{line}</p>" for line in lines) + "</footer>"


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
