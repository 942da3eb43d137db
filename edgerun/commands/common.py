"""What several verbs share: the exporter they are handed, options, progress, and how a report is printed."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from edgerun import __version__, report_html
from edgerun.errors import EdgerunError
from edgerun.machine import this_machine
from edgerun.recipe import DhsaOptions, Recipe
from edgerun.report import Report, Step, to_text

if TYPE_CHECKING:
    from edgerun.bundle import Bundle
    from edgerun.calibration import Calibration
    from edgerun.memory_plan import MemoryPlan
    from edgerun.video_recipe import VideoRecipe

GOOD, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

StageProgress = Callable[[str, float], None]


class Exporter(Protocol):
    """edgerun.export, as the command line hands it to the verbs that need it."""

    def export_bundle(
        self,
        checkpoint: pathlib.Path,
        recipe: Recipe,
        out: pathlib.Path,
        *,
        calibration: Calibration | None = None,
        memory_limit_bytes: int | None = None,
        overwrite: bool = False,
        progress: StageProgress | None = None,
    ) -> Bundle: ...

    def export_video_bundle(
        self,
        checkpoint: pathlib.Path,
        recipe: VideoRecipe,
        out: pathlib.Path,
        *,
        overwrite: bool = False,
        parallel: bool = False,
        progress: StageProgress | None = None,
    ) -> Bundle: ...

    def plan(self, checkpoint: pathlib.Path, recipe: Recipe) -> MemoryPlan: ...


@dataclasses.dataclass(frozen=True)
class Tools:
    """What a verb cannot import itself. exporter: loads edgerun.export, or says how to install what it lacks."""

    exporter: Callable[[], Exporter]
    command: str  # the command line as it was typed


def begin_report(kind: str, title: str, command: str) -> Report:
    """A report of now, on this machine, with nothing measured yet."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Report(kind, title, now, command, __version__, this_machine())


def add_output_options(parser: argparse.ArgumentParser, *, html: bool = True) -> None:
    """--json and --html, which every verb with a report has."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    if html:
        parser.add_argument("--html", type=pathlib.Path, metavar="FILE", help="also write the report as one HTML page")


def emit(report: Report, arguments: argparse.Namespace) -> int:
    """Print the report as asked; the exit status is 1 when one of its checks failed."""
    if arguments.json:
        print(json.dumps(report.to_json(), indent=1, allow_nan=False))
    else:
        print(to_text(report, colour=sys.stdout.isatty()), end="")
    html = getattr(arguments, "html", None)
    if html is not None:
        report_html.write_html(report, html)
    return GOOD if report.passed else CHECK_FAILED


def checkpoint_path(text: str) -> pathlib.Path:
    """A checkpoint's folder; "zoo:NAME" is one that ships with edgerun. Raises EdgerunError for another zoo name."""
    if not text.startswith("zoo:"):
        return pathlib.Path(text)
    from edgerun.zoo import zoo_model_path

    try:
        return zoo_model_path(text.removeprefix("zoo:"))
    except ValueError as error:
        raise EdgerunError(str(error)) from error


def make_folder(path: pathlib.Path) -> None:
    """Make a folder for results, with its parents. Raises EdgerunError where a file is in the way."""
    for one in (path, *path.parents):
        if one.exists() and not one.is_dir():
            raise EdgerunError(f"{path}: {one} is a file, not a folder: give another --output")
    path.mkdir(parents=True, exist_ok=True)


def byte_size(text: str) -> int:
    """Bytes of "800MB", "4GiB" or a plain count. Raises ArgumentTypeError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write it as 800MB, 4GiB or a count of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


def positive(text: str) -> int:
    """A whole number of at least 1. Raises ArgumentTypeError for anything else."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def finite(text: str) -> float:
    """A finite number. Raises ArgumentTypeError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def not_negative(text: str) -> int:
    """A whole number of at least 0. Raises ArgumentTypeError for anything else."""
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def positive_list(text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, as "512,1024" or as doublings, "512..4096". Raises ArgumentTypeError otherwise."""
    values: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        value, most = positive(first), positive(last if dots else first)
        if most < value:
            raise argparse.ArgumentTypeError(f"{part!r} ends below its beginning; write {most}..{value}")
        while value <= most:
            values.append(value)
            value *= 2
    return tuple(values)


class _Stated(argparse.Action):
    """Stores the value and remembers that the option was given, even where the value is the default."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.stated = (*getattr(namespace, "stated", ()), option)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Every choice of the recipe as an option; `recipe_from` reads them."""
    recipe, dhsa = Recipe(), DhsaOptions()
    group = parser.add_argument_group("what the bundle computes")
    group.add_argument(
        "--attention",
        action=_Stated,
        choices=("dhsa", "dense"),
        default=recipe.attention,
        help="default: %(default)s",
    )
    group.add_argument("--max-context", type=positive, metavar="N", help="tokens; default: the model's own limit")
    group.add_argument(
        "--prefill-slice",
        type=positive,
        default=recipe.prefill_slice,
        metavar="N",
        help="most tokens a call; default: %(default)s",
    )
    group.add_argument(
        "--quantize",
        choices=("none", "int8", "8da4w"),
        default=recipe.quantize,
        help="weights; activations are 8-bit dynamic; of video models none or int8; default: %(default)s",
    )
    group.add_argument(
        "--dtype",
        choices=("fp32", "fp16"),
        default=recipe.dtype,
        help="of weights, activations and cache; default: %(default)s",
    )
    group.add_argument(
        "--embedding-dtype",
        choices=("auto", "fp32", "fp16", "int8"),
        default=recipe.embedding_dtype,
        help="auto: int8 when quantized, else --dtype",
    )
    group.add_argument(
        "--kv-dtype",
        choices=("auto", "fp32", "fp16", "int8"),
        default=recipe.kv_dtype,
        help="of the key/value cache; auto: --dtype",
    )
    sparse = parser.add_argument_group("sparse attention (with --attention dhsa)")
    sparse.add_argument(
        "--budget",
        action=_Stated,
        type=positive,
        default=dhsa.budget,
        metavar="N",
        help="most key tokens a query tile attends; default: %(default)s",
    )
    sparse.add_argument(
        "--tile",
        action=_Stated,
        type=positive,
        default=dhsa.tile,
        metavar="N",
        help="queries that share a selection; default: %(default)s",
    )
    sparse.add_argument(
        "--sink",
        action=_Stated,
        type=int,
        default=dhsa.sink,
        metavar="N",
        help="first tokens, always attended; default: %(default)s",
    )
    sparse.add_argument(
        "--dense-tail",
        action=_Stated,
        type=int,
        default=dhsa.dense_tail,
        metavar="N",
        help="calls of 2..N tokens attend densely; default: %(default)s",
    )
    sparse.add_argument(
        "--dense-layers",
        action=_Stated,
        type=int,
        default=dhsa.dense_layers,
        metavar="N",
        help="first layers that stay dense; default: %(default)s",
    )
    sparse.add_argument(
        "--chunking", action=_Stated, choices=("fixed", "cosine"), default=dhsa.chunking, help="default: %(default)s"
    )
    sparse.add_argument(
        "--boundary-threshold",
        action=_Stated,
        type=float,
        default=dhsa.boundary_threshold,
        metavar="X",
        help="default: %(default)s",
    )
    poolings = ("mean", "sqrt", "centred", "minmax", "moments")
    sparse.add_argument(
        "--pooling", action=_Stated, choices=poolings, default=dhsa.pooling, help="default: %(default)s"
    )
    sparse.add_argument(
        "--query-pooling",
        action=_Stated,
        choices=("mean", "max"),
        default=dhsa.query_pooling,
        help="default: %(default)s",
    )
    sparse.add_argument(
        "--refine",
        action=_Stated,
        type=int,
        default=dhsa.refine,
        metavar="N",
        help="key channels that rank the best again in decode (--pooling moments); 0: none; default: %(default)s",
    )
    sparse.add_argument(
        "--reselect",
        action=_Stated,
        type=int,
        default=dhsa.reselect,
        metavar="N",
        help="tokens of decode that one selection serves. Above 1 decode is faster and retrieves far less "
        "(bench/results/decode_selection.json); default: %(default)s",
    )
    sparse.add_argument(
        "--selector",
        action=_Stated,
        choices=("chunk", "block-topk", "window-sink"),
        default=dhsa.selector,
        help="default: %(default)s",
    )


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The recipe of `add_recipe_options`. Raises ExportError for a choice that is out of range."""
    values = vars(arguments)
    names = [field.name for field in dataclasses.fields(DhsaOptions) if field.name != "layers"]
    dhsa = DhsaOptions(**{name: values[name] for name in names})
    own = {field.name: values[field.name] for field in dataclasses.fields(Recipe) if field.name != "dhsa"}
    return Recipe(dhsa=dhsa, **own)


def add_calibration_option(parser: argparse.ArgumentParser) -> None:
    """--calibration; `calibrated_recipe` reads it together with the recipe's options."""
    parser.add_argument(
        "--calibration",
        type=pathlib.Path,
        metavar="FILE",
        help="attend in every layer as `edgerun calibrate` chose; takes the place of the sparse attention options",
    )


def calibrated_recipe(arguments: argparse.Namespace) -> tuple[Recipe, Calibration | None]:
    """The recipe of the options, its sparse attention that of --calibration where it is given.

    Raises EdgerunError for a file that is no calibration, and for an option beside it that it decides.
    """
    recipe = recipe_from(arguments)
    if arguments.calibration is None:
        return recipe, None
    from edgerun.calibration import Calibration

    if stated := getattr(arguments, "stated", ()):
        raise EdgerunError(f"{stated[0]} is given beside --calibration, which decides it: leave out one of them")
    calibration = Calibration.open(arguments.calibration)
    return dataclasses.replace(recipe, attention="dhsa", dhsa=calibration.dhsa), calibration


class Clock:
    """Wall time of named steps, for a report; says each step on stderr as it ends when told to."""

    def __init__(self, *, say: bool = False) -> None:
        self.steps: list[Step] = []
        self._say = say

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what runs inside; nothing is recorded when it raises."""
        begin = time.monotonic()
        yield
        self.steps.append(Step(name, time.monotonic() - begin))
        if self._say:
            print(f"  {name:<58} {self.steps[-1].seconds:6.1f} s", file=sys.stderr, flush=True)


@contextmanager
def stage_bar(title: str) -> Iterator[StageProgress]:
    """A tqdm bar for work that reports (stage, fraction done). Without a terminal: one line a stage."""
    import tqdm

    quiet = not sys.stderr.isatty()
    said: set[str] = set()
    bar: Any = tqdm.tqdm(
        total=100, desc=title, disable=quiet, leave=False, bar_format="{desc} {percentage:3.0f}% |{bar:30}| {elapsed}"
    )

    def progress(stage: str, fraction: float) -> None:
        if quiet:
            if stage not in said:
                said.add(stage)
                print(f"{title}: {stage}", file=sys.stderr, flush=True)
            return
        bar.set_description_str(f"{title}: {stage}", refresh=False)
        bar.n = round(100 * min(1.0, max(0.0, fraction)))
        bar.refresh()

    try:
        yield progress
    finally:
        bar.close()


def describe_facts(facts: Mapping[str, object] | None) -> str:
    """A device's facts in one line; what it does not know is left out."""
    known = {name: value for name, value in (facts or {}).items() if value not in (None, "", [])}
    return ", ".join(f"{name} {' '.join(v) if isinstance(v, list) else v}" for name, v in known.items())


def quoted(argv: list[str]) -> str:
    """The command line as it can be typed again."""
    return "edgerun " + shlex.join(argv)
