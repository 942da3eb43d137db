"""The whole way on a small model, in minutes on two cores.

text: export the model that ships dense and sparse, answer a long prompt on two devices, compare.
video: export the video model that ships, make clips of captions, plain and with the techniques alone and together, side
by side.

Writes the bundles, report.json and report.html (open it in a browser) to --output; video writes its clips there too.

examples
  edgerun demo
  edgerun demo video
  edgerun demo --output /tmp/demo --no-device        without the emulated arm64 device
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
import shlex
import sys

from edgerun import line_chart
from edgerun.commands import bench, demo_video
from edgerun.commands import eval as evaluation
from edgerun.commands.common import (
    Clock,
    Exporter,
    Tools,
    begin_report,
    checkpoint_path,
    emit,
    make_folder,
    positive,
    stage_bar,
)
from edgerun.commands.eval_contenders import budget_contenders
from edgerun.commands.measure import force_on, generate_on
from edgerun.errors import EdgerunError
from edgerun.evaluation.answers import Job
from edgerun.library_noise import quiet_libraries
from edgerun.machine import available_cores
from edgerun.recipe import DhsaOptions, Recipe
from edgerun.report import Cell, Check, Column, Report, Table, write_json, write_whole
from edgerun.report_html import write_html

SUMMARY = "the whole way on a small model, in a few minutes"
MODEL, VIDEO_MODEL = "zoo:text", "zoo:video"
RECIPES = {
    "dense": Recipe(attention="dense"),
    "dhsa": Recipe(attention="dhsa", dhsa=DhsaOptions(budget=1024)),
}
LONG = Job("ruler", "niah_multikey_2", 8192, seed=0, index=0)
SHORT = Job("ruler", "niah_multikey_2", 1280, seed=0, index=0)
BENCH_LENGTHS = (1024, 2048, 4096, 8192)
BENCH_REPEATS = 2
ACCURACY_TASK, ACCURACY_LENGTH, ACCURACY_SAMPLES = "niah_multikey_2", 4096, 10
ACCURACY_BUDGETS, ACCURACY_SELECTORS = (384, 768, 1536), ("chunk", "window-sink")

SECOND_DEVICE = "emulated-arm64"
_OUTPUTS = {"text": pathlib.Path("demo_output"), "video": pathlib.Path("demo_output/video")}

_COLUMNS = (
    Column("device"),
    Column("attention"),
    Column("prompt", "bytes"),
    Column("right answer"),
    Column("prefill", "s", 2),
    Column("decode", "ms/token", 1),
    Column("peak RSS", "MiB", 0),
    Column("density", "%", 1),
    Column("KL to eager", "nats"),
    Column("top-1 as eager", "%", 1),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun demo`."""
    parser.add_argument("what", nargs="?", choices=tuple(_OUTPUTS), default="text", help="default: %(default)s")
    parser.add_argument(
        "-o",
        "--output",
        type=pathlib.Path,
        metavar="FOLDER",
        help=f"default: {_OUTPUTS['text']}, of video {_OUTPUTS['video']}",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        help=f"video: another model, made by bench/train_zoo_video.py; default: {VIDEO_MODEL}",
    )
    parser.add_argument(
        "--captions", type=positive, metavar="N", help=f"video: clips of each way; default: {demo_video.CAPTIONS}"
    )
    parser.add_argument("--device", metavar="D", help=f"text: the second one; default: {SECOND_DEVICE}")
    parser.add_argument("--no-device", action="store_true", help="text: this machine only")
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """`edgerun demo`."""
    output: pathlib.Path = arguments.output or _OUTPUTS[arguments.what]
    if arguments.what == "video":
        if arguments.device is not None or arguments.no_device:
            raise EdgerunError("--device and --no-device are of the text demo: leave them out with video")
        model = arguments.checkpoint or VIDEO_MODEL
        captions = arguments.captions or demo_video.CAPTIONS
        report = demo_video.demonstrate(output, tools.exporter(), model, captions, command=tools.command)
        following = f'{shlex.quote(str(output / demo_video.BUNDLE))} --prompt "a blue star turns clockwise" -o clip.mp4'
        following += f" --solver ab2 --steps {demo_video.share_of(30, demo_video.FEW_SHARE)}"
    else:
        if arguments.checkpoint is not None or arguments.captions is not None:
            raise EdgerunError("--checkpoint and --captions are of the video demo: leave them out with text")
        device = None if arguments.no_device else arguments.device or SECOND_DEVICE
        report = demonstrate(output, tools.exporter(), device_name=device, command=tools.command)
        following = f'{shlex.quote(str(output / "dhsa.edgerun"))} --prompt "The grass is" --stream'
    status = emit(report, arguments)
    if not arguments.json:
        print(f"\nReport: {output / 'report.html'} (open it in a browser) and {output / 'report.json'}")
        print(f"Next:   edgerun run {following}")
    return status


def demonstrate(output: pathlib.Path, exporter: Exporter, *, device_name: str | None, command: str = "") -> Report:
    """Do it all and write bundles and reports to `output`.

    device_name: the second device; when it is not there, the report says so, but a run that fails there is an error.
    Raises EdgerunError as the stages do, DeviceError for a name that is none before anything else.
    """
    from edgerun.devices import list_devices, open_device

    if device_name is not None:
        open_device(device_name)
    make_folder(output)
    checkpoint, clock = checkpoint_path(MODEL), Clock(say=True)
    print("edgerun demo: a small model, exported with dense and with sparse attention, on two devices", file=sys.stderr)
    bundles = {name: output / f"{name}.edgerun" for name in RECIPES}
    with clock.step("export dense and dhsa, side by side"):
        _export(checkpoint, bundles, exporter)
    rows: list[tuple[Cell, ...]] = []
    checks: list[Check] = []
    for name, path in bundles.items():
        with clock.step(f"answer {LONG.length:,} bytes on this machine, {name}"):
            row, found = answer_row("host", name, path, checkpoint, LONG)
        rows.append(row)
        checks += found
    notes = []
    if device_name is not None:
        missing = list_devices((device_name,))[0].missing
        if missing is None:
            found_rows, found_checks = _second_device(device_name, checkpoint, bundles, clock)
            rows += found_rows
            checks += found_checks
        else:
            notes.append(f"Without {device_name}: {missing}")
    with clock.step(f"right answers against budget, {ACCURACY_SAMPLES} prompts"):
        accuracy = _accuracy(checkpoint)
    with clock.step("prefill time against length"):
        speed = bench.bench_bundles([bundles["dhsa"], bundles["dense"]], BENCH_LENGTHS, 0, repeats=BENCH_REPEATS)
    report = begin_report("demo", "edgerun demo: one model, dense and sparse, on two devices", command)
    note = "Times on an emulated device say nothing of a real one. Density: attended of all causal pairs."
    answers = Table("Answers to a retrieval prompt", _COLUMNS, tuple(rows), note)
    report = dataclasses.replace(
        report,
        facts=_facts(),
        tables=(answers, *accuracy.tables, *speed.tables[:1]),
        plots=(*speed.plots, *accuracy.plots),
        checks=tuple(checks),
        steps=tuple(clock.steps),
        notes=tuple(notes),
    )
    write_json(report, output / "report.json")
    write_html(report, output / "report.html")
    for name, plot in zip(("prefill.svg", "accuracy.svg"), report.plots, strict=True):
        write_whole(output / name, line_chart.render(plot, line_chart.names_of(report.plots)))
    return report


def answer_row(
    device_name: str, attention: str, bundle_path: pathlib.Path, checkpoint: pathlib.Path, job: Job
) -> tuple[tuple[Cell, ...], tuple[Check, ...]]:
    """Answer a sample on a device and by the eager model: a row of the table, and its gates.

    The device is fed the eager model's answer. Where its own choice is the same at every step, that is its answer; else
    it answers again by itself.
    """
    from edgerun.bundle import Bundle
    from edgerun.devices import open_device
    from edgerun.evaluation import fidelity, ruler
    from edgerun.models import causal_lm

    bundle, sample, device = Bundle.open(bundle_path), job.sample(), open_device(device_name)
    tokenizer = bundle.tokenizer()
    prompt = tokenizer.encode(sample.prompt).ids
    eager = fidelity.greedy(
        causal_lm.load(checkpoint, bundle.recipe),
        prompt,
        max_new_tokens=sample.max_new_tokens,
        ends=bundle.manifest["tokens"]["eos_ids"],
        prefill_slice=bundle.recipe.prefill_slice,
    )
    measured, logits = force_on(device, bundle_path, prompt, eager.tokens[:-1])
    found = fidelity.measure(logits, eager.logits)
    tokens = list(eager.tokens)
    if found.divergence is not None:
        _, tokens = generate_on(device, bundle_path, prompt, max_new_tokens=sample.max_new_tokens)
    checks = fidelity.checks(found, bundle.recipe, sparse=measured.sparse, label=f"{attention} on {device_name}: ")
    decode, memory, density = measured.decode_s_per_token, measured.peak_rss_bytes, measured.density
    row = (
        device_name,
        attention,
        len(sample.prompt.encode()),
        ruler.score(sample, tokenizer.decode(tokens)) == 1.0,
        measured.prefill_s,
        None if decode is None else 1e3 * decode,
        None if memory is None else memory / 2**20,
        None if density is None else 100 * density,
        found.mean_kl_nats,
        100 * found.top1,
    )
    return row, checks


def _export(checkpoint: pathlib.Path, bundles: dict[str, pathlib.Path], exporter: Exporter) -> None:
    """The sparse bundle here, with a bar, and the dense one in a process beside it: lowering takes one core each."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, quiet_libraries) as pool, stage_bar("export") as progress:
        dense = pool.submit(exporter.export_bundle, checkpoint, RECIPES["dense"], bundles["dense"], overwrite=True)
        exporter.export_bundle(checkpoint, RECIPES["dhsa"], bundles["dhsa"], overwrite=True, progress=progress)
        dense.result()


def _second_device(
    name: str, checkpoint: pathlib.Path, bundles: dict[str, pathlib.Path], clock: Clock
) -> tuple[list[tuple[Cell, ...]], list[Check]]:
    rows: list[tuple[Cell, ...]] = []
    checks: list[Check] = []
    for attention, path in bundles.items():
        with clock.step(f"answer {SHORT.length:,} bytes on {name}, {attention}"):
            row, found = answer_row(name, attention, path, checkpoint, SHORT)
        rows.append(row)
        checks += found
    return rows, checks


def _accuracy(checkpoint: pathlib.Path) -> Report:
    base = Recipe(max_context=ACCURACY_LENGTH)
    contenders = budget_contenders(checkpoint, base, ACCURACY_BUDGETS, ACCURACY_SELECTORS)
    jobs = evaluation.make_jobs("ruler", (ACCURACY_TASK,), (ACCURACY_LENGTH,), ACCURACY_SAMPLES, seed=1)
    report = evaluation.evaluate(contenders, jobs, processes=available_cores())
    return dataclasses.replace(report, plots=evaluation.budget_plots(contenders, report))


def _facts() -> tuple[tuple[str, Cell], ...]:
    sparse = RECIPES["dhsa"].dhsa
    return (
        ("model", f"{MODEL}, a byte-level Llama-type decoder that ships with edgerun"),
        ("prompt", f"{LONG.task}: one needle asked for among many, {LONG.length:,} bytes with the answer"),
        ("sparse attention", f"at most {sparse.budget:,} key tokens for every {sparse.tile} queries, chosen by chunk"),
    )
