"""What `edgerun export` and `edgerun run` do for a video model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgerun.commands.common import GOOD, Tools, begin_report, emit, finite, not_negative, positive, stage_bar
from edgerun.errors import EdgerunError, ExportError
from edgerun.models.solvers import SOLVERS, respaced
from edgerun.report import Column, Table
from edgerun.techniques.temporal_token_merging import PAPER_PARTS, PARTS
from edgerun.video_recipe import VideoRecipe

if TYPE_CHECKING:
    from edgerun.bundle import Bundle
    from edgerun.devices import VideoRunRequest
    from edgerun.models.text_encoder import PromptTokenizer
    from edgerun.sessions.video import Clip, Leap, Progress

_STATE = "state"
_LINE_EVERY_MS = 10_000.0  # of progress, where there is no terminal


def is_video_checkpoint(folder: pathlib.Path) -> bool:
    """Whether the folder is laid out as a text-to-video checkpoint."""
    return (folder / "denoiser").is_dir()


# ---------------------------------------------------------------- export


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun export` for a folder with denoiser/, vae/ and text_encoder/."""
    video = parser.add_argument_group("video models (None: as the checkpoint's video.json has it)")
    video.add_argument("--frames", type=positive, metavar="N", help="of the clip, any number")
    video.add_argument("--height", type=positive, metavar="PIXELS")
    video.add_argument("--width", type=positive, metavar="PIXELS")
    video.add_argument("--steps", type=positive, metavar="N", help="of the sampler")
    video.add_argument("--guidance", type=finite, metavar="G", help="how strongly the prompt leads")
    add_technique_options(video)
    video.add_argument(
        "--tdtm-parts",
        metavar="LIST",
        default=",".join(PAPER_PARTS),
        help=f"where frames are merged, of {', '.join(PARTS)}; default: %(default)s",
    )
    video.add_argument(
        "--blocks",
        type=positive,
        metavar="N",
        help="at most so many programs for the denoiser's blocks, of equal numbers of pairs; default: one a pair",
    )


def add_run_technique_options(group: argparse._ArgumentGroup) -> None:
    """--steps, and those of `add_technique_options`, instead of what the bundle has."""
    group.add_argument("--steps", type=positive, metavar="N", help="of the sampler, spaced as the bundle's")
    add_technique_options(group, "the bundle's")


def add_technique_options(group: argparse._ArgumentGroup, default: str = "euler") -> None:
    """--solver, --lpl and --tdtm. default: of the solver."""
    group.add_argument(
        "--solver",
        choices=SOLVERS,
        help=f"how steps are made: euler, or ab2, second order, which needs fewer (--steps); default: {default}",
    )
    group.add_argument(
        "--lpl",
        metavar="RULE",
        help="linear proportional leap: none, N evaluations and then the leap, or cosine[:TIME,TOLERANCE,PATIENCE]: "
        "not above TIME (0.5), once velocities came no closer by TOLERANCE (0.001) for PATIENCE (3) steps",
    )
    group.add_argument(
        "--tdtm", type=not_negative, metavar="STEPS", help="merge pairs of frames in so many first steps; 0: never"
    )


def video_recipe(arguments: argparse.Namespace, depth: int) -> VideoRecipe:
    """The recipe of the parsed options. depth: of the denoiser, in pairs of blocks."""
    leap = parse_leap(arguments.lpl or "none")
    blocks = arguments.blocks or depth
    if blocks > depth:
        raise ExportError(f"--blocks is {blocks}; the denoiser has {depth} pairs of blocks: give at most that")
    if arguments.quantize == "8da4w":
        raise ExportError("--quantize 8da4w is for text models; a video model's weights can be int8")
    if arguments.tdtm is None and arguments.tdtm_parts != ",".join(PAPER_PARTS):
        raise ExportError("--tdtm-parts is given without --tdtm STEPS: pass both, or neither")
    return VideoRecipe(
        frames=arguments.frames,
        height=arguments.height,
        width=arguments.width,
        steps=arguments.steps,
        guidance=arguments.guidance,
        solver=arguments.solver or "euler",
        leap=leap.kind,
        leap_evaluations=leap.evaluations,
        leap_latest_time=leap.latest_time,
        leap_tolerance=leap.tolerance,
        leap_patience=leap.patience,
        merge_steps=arguments.tdtm or 0,
        merge_parts=tuple(part.strip() for part in arguments.tdtm_parts.split(",")),
        merge_possible=arguments.tdtm is not None,
        pairs_per_program=-(-depth // blocks),
        quantize=arguments.quantize,
    )


def parse_leap(text: str) -> Leap:
    """The leap rule of "none", "cosine", "cosine:TIME,TOLERANCE,PATIENCE" or a number of evaluations.

    The last numbers of a cosine rule may be left out. Raises EdgerunError for anything else.
    """
    from edgerun.sessions.video import Leap

    kind, colon, rest = text.partition(":")
    if kind == "none" and not colon:
        return Leap("none")
    if kind == "cosine":
        given = dict(zip(("latest_time", "tolerance", "patience"), rest.split(","), strict=False)) if colon else {}
        try:
            numbers = {name: int(value) if name == "patience" else float(value) for name, value in given.items()}
            leap = Leap("cosine", **numbers)  # type: ignore[arg-type]
        except ValueError:
            leap = None
        if leap is not None and rest.count(",") <= 2 and 0 < leap.latest_time <= 1 and leap.patience >= 1:
            return leap
    elif re.fullmatch("[0-9]+", text) and int(text) >= 1:
        return Leap("fixed", int(text))
    raise EdgerunError(
        f"--lpl is {text!r}; write none, the number of evaluations before the leap, cosine, or "
        "cosine:TIME,TOLERANCE,PATIENCE with 0 < TIME <= 1 and PATIENCE >= 1, as cosine:0.6,0.001,3"
    )


def run_times(steps: int | None, bundle: Bundle) -> tuple[float, ...] | None:
    """The times of so many steps, spaced as the bundle's. None: the bundle's own."""
    return None if steps is None else tuple(respaced(bundle.manifest["video"]["times"], steps))


def run_leap(text: str | None, own: dict[str, Any]) -> Leap | None:
    """The rule that a run is asked for; own: the bundle's, whose numbers a bare "cosine" means. None: the bundle's."""
    if text is None or (text == "cosine" and own["kind"] == "cosine"):
        return None
    return parse_leap(text)


def export(arguments: argparse.Namespace, tools: Tools, checkpoint: pathlib.Path) -> int:
    """`edgerun export` of a video checkpoint."""
    from edgerun.models.text_to_video import VideoCheckpoint

    if arguments.dry_run or arguments.memory_limit is not None:
        raise ExportError(
            "--dry-run and --memory-limit plan the memory of text models; a video bundle takes its limit when it runs: "
            "edgerun run … --memory-limit 1GB"
        )
    source = VideoCheckpoint.open(checkpoint)
    recipe = video_recipe(arguments, source.denoiser.depth)
    report = begin_report("export", f"edgerun export: {arguments.checkpoint}", tools.command)
    exporter = tools.exporter()
    with stage_bar(f"export {arguments.output.name}") as progress:
        bundle = exporter.export_video_bundle(
            checkpoint, recipe, arguments.output, overwrite=arguments.overwrite, parallel=True, progress=progress
        )
    manifest = bundle.manifest
    video, files = manifest["video"], manifest["files"]
    facts = (
        ("bundle", str(arguments.output)),
        ("build", manifest["build"][:16]),
        ("size", f"{sum(entry['bytes'] for entry in files.values()) / 2**20:.1f} MiB"),
        ("clip", f"{video['frames']} frames of {video['height']} x {video['width']}, {video['fps']:g} a second"),
        ("sampler", sampler_text(video)),
        ("techniques", f"LPL {leap_text(video['leap'])}, {merge_text(video)}"),
        ("weights", _weights_text(recipe)),
    )
    sizes = {program["name"]: files[program["file"]]["bytes"] for program in manifest["programs"]}
    found = manifest.get("quantization", {})
    rows = tuple(
        (chain, len(names), sum(sizes[name] for name in names) / 2**20, max(sizes[name] for name in names) / 2**20,
         max(manifest["parity"][name] for name in names),
         max((found[name] for name in names if name in found), default=None))
        for chain, names in manifest["chains"].items()
    )  # fmt: skip
    columns = (
        Column("chain"),
        Column("programs"),
        Column("all", "MiB", 1),
        Column("largest", "MiB", 1),
        Column("worst error", "relative L2", 9),
        Column("int8 against float32", "relative L2", 4),
    )
    table = Table("Programs, each held against its module", columns, rows)
    return emit(dataclasses.replace(report, facts=facts, tables=(table,)), arguments)


def sampler_text(video: dict[str, Any]) -> str:
    """A manifest's sampler in words."""
    return f"{video['steps']} steps of {video.get('solver', SOLVERS[0])}, guidance {video['guidance']:g}"


def leap_text(leap: dict[str, Any]) -> str:
    """A manifest's leap in words."""
    if leap["kind"] == "cosine":
        return f"cosine at times to {leap['latest_time']:g}"
    return f"after {leap['evaluations']}" if leap["kind"] == "fixed" else "none"


def _weights_text(recipe: VideoRecipe) -> str:
    return "float32" if recipe.quantize == "none" else "int8 in text encoder and denoiser, float32 in the decoder"


def merge_text(video: dict[str, Any]) -> str:
    """A manifest's merging in words."""
    return f"TDTM in {video['merge']['steps']} steps" if "merge" in video else "no TDTM"


# ---------------------------------------------------------------- run


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun run` for a video bundle."""
    video = parser.add_argument_group("video bundles")
    video.add_argument(
        "-o", "--output", type=pathlib.Path, metavar="CLIP", help="the file to write: .mp4, .gif or .png"
    )
    video.add_argument("--guidance", type=finite, metavar="G", help="instead of the bundle's")
    add_run_technique_options(video)
    video.add_argument(
        "--prefetch", type=not_negative, default=1, metavar="N", help="programs to load ahead; default: %(default)s"
    )
    video.add_argument(
        "--state",
        type=pathlib.Path,
        metavar="FILE",
        help="where a run on the host that is stopped saves itself, and goes on from",
    )


def run(arguments: argparse.Namespace, tools: Tools, prompt: str, memory_limit_bytes: int | None) -> int:
    """`edgerun run` of a video bundle."""
    from edgerun.bundle import Bundle
    from edgerun.devices import VideoRunRequest, open_device
    from edgerun.video_file import check_path, write_clip

    if arguments.output is None:
        raise EdgerunError(f"{arguments.bundle} makes a clip: pass -o CLIP.mp4 (or .gif, or .png)")
    if given := _text_options(arguments):
        raise EdgerunError(f"{given[0]} is for text; {arguments.bundle} is a video bundle: leave it out")
    check_path(arguments.output)
    device = open_device(arguments.device)
    _check_state_path(arguments)
    bundle = Bundle.open(arguments.bundle, kind="video")
    tokenizer = prompt_tokenizer(bundle)
    request = VideoRunRequest(
        tokens=prompt_tokens(tokenizer, prompt),
        seed=arguments.seed,
        guidance=arguments.guidance,
        times=run_times(arguments.steps, bundle),
        solver=arguments.solver,
        leap=run_leap(arguments.lpl, bundle.manifest["video"]["leap"]),
        merge_steps=arguments.tdtm,
        memory_limit_bytes=memory_limit_bytes,
        prefetch=arguments.prefetch,
        threads=arguments.threads,
    )
    run_facts = {
        "build": bundle.build,
        "prompt": prompt,
        **{name: getattr(arguments, name) for name in ("seed", "guidance", "steps", "solver", "lpl", "tdtm")},
    }
    if unknown := tokenizer.unknown_words(prompt):
        print(f"note: the model does not know {', '.join(map(repr, unknown))}", file=sys.stderr)
    saved = _saved_state(arguments.state, run_facts)
    begin, state = time.monotonic(), b""
    with _step_bar() as on_progress:
        request = dataclasses.replace(request, on_progress=on_progress)
        if device.name == "host":
            clip, state = _run_here(bundle, request, saved, arguments.state, run_facts)
        else:
            clip = device.run(bundle.path, request).clip
    try:
        write_clip(clip.frames, float(bundle.manifest["video"]["fps"]), arguments.output)
    except BaseException:  # Ctrl-C too
        _keep(arguments.state, run_facts, state)
        raise
    if arguments.state is not None:
        arguments.state.unlink(missing_ok=True)
    seconds = time.monotonic() - begin
    if not arguments.json:
        print(f"{arguments.output}: {clip.frames.shape[0]} frames of {clip.frames.shape[1]} x {clip.frames.shape[2]}")
        print(_summary(clip, seconds), file=sys.stderr)
        return GOOD
    report = begin_report("run", f"edgerun run: {arguments.bundle}", tools.command)
    facts = (("clip", str(arguments.output)), ("device", device.name))
    return emit(dataclasses.replace(report, facts=facts, tables=(_table(clip, seconds),)), arguments)


def _run_here(
    bundle: Bundle,
    request: VideoRunRequest,
    saved: bytes | None,
    state_path: pathlib.Path | None,
    run_facts: dict[str, Any],
) -> tuple[Clip, bytes]:
    """The clip, and the state after it, made in this process; a run that ends early is saved at `state_path`."""
    from edgerun.sessions.video import VideoSession

    session = VideoSession(
        bundle.path,
        threads=request.threads,
        verify=False,  # just done
        prefetch=request.prefetch,
        memory_limit_bytes=request.memory_limit_bytes,
    )
    try:
        clip = session.generate(
            request.tokens,
            seed=request.seed,
            guidance=request.guidance,
            times=request.times,
            solver=request.solver,
            leap=request.leap,
            merge_steps=request.merge_steps,
            state=saved,
            on_progress=request.on_progress,
        )
    except BaseException:  # Ctrl-C, and what may be mended, as a memory limit: the steps that are done are kept
        _keep(state_path, run_facts, session.state)
        raise
    return clip, session.state if state_path is not None else b""


def _keep(path: pathlib.Path | None, run_facts: dict[str, Any], state: bytes) -> None:
    """Save a run that does not end well, where a file for it was given and there is something to go on from."""
    if path is not None and state:
        _save_state(path, run_facts, state)
        print(f"edgerun run: stopped; the same command goes on from {path}", file=sys.stderr)


def _check_state_path(arguments: argparse.Namespace) -> None:
    if arguments.state is None:
        return
    if arguments.device != "host":
        raise EdgerunError(f"--{_STATE} keeps runs of the host; with --device {arguments.device} leave it out")
    if not arguments.state.absolute().parent.is_dir():
        raise EdgerunError(f"--{_STATE} {arguments.state}: its folder does not exist; create it first")


def prompt_tokenizer(bundle: Bundle) -> PromptTokenizer:
    """A video bundle's tokenizer with its limit. Raises CheckpointError when it is damaged."""
    from edgerun.models.text_encoder import PromptTokenizer

    return PromptTokenizer.load(bundle.path / "tokenizer", int(bundle.manifest["tokens"]["max_prompt_tokens"]))


def prompt_tokens(tokenizer: PromptTokenizer, prompt: str) -> tuple[int, ...]:
    """The tokens of a prompt. Raises EdgerunError for one that is empty, or over the limit."""
    if not prompt.strip():
        raise EdgerunError("the prompt is empty: say what the clip shows")
    return tuple(tokenizer.encode(prompt)[0].tolist())


def _text_options(arguments: argparse.Namespace) -> list[str]:
    """What of `edgerun run`'s options for text was given another value than its default."""
    from edgerun.commands.run import Sampling

    of_text = {"stream": False} | dataclasses.asdict(Sampling())
    del of_text["seed"]  # the noise has one too
    return [f"--{name.replace('_', '-')}" for name, value in of_text.items() if getattr(arguments, name) != value]


def _saved_state(path: pathlib.Path | None, run_facts: dict[str, Any]) -> bytes | None:
    """The state in the file; None when there is no file. Raises EdgerunError for one of another run."""
    if path is None or not path.exists():
        return None
    head, newline, state = path.read_bytes().partition(b"\n")
    try:
        saved = json.loads(head)
    except ValueError:
        saved = None
    if not newline or not isinstance(saved, dict) or set(saved) != set(run_facts):
        raise EdgerunError(f"{path} is not a saved run: remove it, or give another --{_STATE}")
    for name, value in run_facts.items():
        if saved[name] != value:
            raise EdgerunError(
                f"{path} was saved by a run whose {name} was {str(saved[name])[:60]!r}, not {str(value)[:60]!r}: "
                f"repeat that command, remove the file, or give another --{_STATE}"
            )
    return state


def _save_state(path: pathlib.Path, run_facts: dict[str, Any], state: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(json.dumps(run_facts).encode() + b"\n" + state)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _step_bar() -> Iterator[Any]:
    """How a run gets on and what is left of its stage: a tqdm bar, or lines where there is no terminal.

    What is left counts all steps of the sampler: a leap ends them sooner.
    """
    import tqdm

    if not sys.stderr.isatty():
        yield _StepLines()
        return

    def begin(stage: str, done: int, total: int) -> Any:  # done: by the run that this one goes on from
        return tqdm.tqdm(desc=stage, initial=done, total=total, leave=False, unit="step")

    bar = begin("encode", 0, 1)

    def on_progress(progress: Progress) -> None:
        nonlocal bar
        if bar.desc != progress.stage:
            bar.close()
            bar = begin(progress.stage, progress.done, progress.total)
        bar.n = progress.done
        bar.refresh()

    try:
        yield on_progress
    finally:
        bar.close()


class _StepLines:
    """A line as a stage begins, and within it at most one every ten seconds, with what is left as MM:SS."""

    def __init__(self) -> None:
        self._first: Progress | None = None  # of the stage
        self._said_ms = 0.0

    def __call__(self, progress: Progress) -> None:
        import tqdm

        first = self._first
        if first is None or first.stage != progress.stage:
            self._first, self._said_ms = progress, progress.elapsed_ms
            print(f"{progress.stage}: {progress.total} to do", file=sys.stderr, flush=True)
        elif first.done < progress.done < progress.total and progress.elapsed_ms - self._said_ms >= _LINE_EVERY_MS:
            self._said_ms = progress.elapsed_ms
            each_ms = (progress.elapsed_ms - first.elapsed_ms) / (progress.done - first.done)
            left = tqdm.tqdm.format_interval(each_ms * (progress.total - progress.done) / 1e3)
            line = f"{progress.stage}: {progress.done} of {progress.total} done, about {left} to go"
            print(line, file=sys.stderr, flush=True)


def _summary(clip: Clip, seconds: float) -> str:
    parts = [f"{name} {taken:.2f} s" for name, taken in _stage_seconds(clip).items() if taken is not None]
    return f"[{', '.join(parts)}, {clip.evaluations} evaluations, {seconds:.2f} s in all]"


def _stage_seconds(clip: Clip) -> dict[str, float | None]:
    """None: a run that went on had done the stage before."""
    stages = {name: clip.report["stages"][name] for name in ("encode", "denoise", "decode")}
    return {name: stage["wall_ms"] / 1e3 if stage else None for name, stage in stages.items()}


def _table(clip: Clip, seconds: float) -> Table:
    columns = (
        Column("encode", "s", 3),
        Column("denoise", "s", 3),
        Column("decode", "s", 3),
        Column("evaluations"),
        Column("all", "s", 2),
    )
    row = (*_stage_seconds(clip).values(), clip.evaluations, seconds)
    return Table("The run", columns, (row,))
