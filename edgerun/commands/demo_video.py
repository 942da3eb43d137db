"""The video half of `edgerun demo`: captions become clips, plain and with the techniques alone and together."""

from __future__ import annotations

import dataclasses
import pathlib
import statistics
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from edgerun import compare
from edgerun.commands.common import Clock, Exporter, begin_report, checkpoint_path, make_folder, stage_bar
from edgerun.models.solvers import Solver, respaced
from edgerun.report import Cell, Check, Column, Estimate, MovingPicture, Report, Table, write_json
from edgerun.report_html import write_html
from edgerun.sessions.video import Leap
from edgerun.video_recipe import VideoRecipe

if TYPE_CHECKING:
    import torch

    from edgerun.bundle import Bundle
    from edgerun.devices import VideoRunReport
    from edgerun.evaluation.clips import Clip

# Of the bundle's steps.
FEW_SHARE = 0.53  # that second-order steps are as many as
LEAP_SHARE = 0.63  # evaluated before a leap
MERGED_SHARE = 1.0  # with merged frames
# Few frames a call: else the decoder, not the denoiser, sets the memory of so small a model.
RECIPE = VideoRecipe(merge_possible=True, frames_per_call=3)
CAPTIONS, CAPTIONS_SEED = 1, 7  # one: all of it takes less than a minute on two cores
REFERENCE_STEPS = 200
LIMIT_SHARE = 0.85  # of plain sampling's peak RSS: the memory limit where programs stream
BUNDLE, PAGE, VALUES = "video.edgerun", "report.html", "report.json"
REFERENCE, PLAIN = f"reference, {REFERENCE_STEPS} steps", "plain"
FEWER, LEAP, MERGED, STREAMED = "ab2", "LPL", "TDTM", "blocks streamed"
PAPERS, FASTEST, TOGETHER = "LPL, TDTM, streamed", "ab2, TDTM", "ab2, TDTM, streamed"

_COLUMNS = (
    Column("method"),
    Column("time", "s", 2),
    Column("denoising", "s", 2),
    Column("NFE", digits=1),
    Column("peak RSS", "MiB", 0),
    Column("as the caption says"),
    Column("PSNR", "dB", 1),
    Column("SSIM", digits=3),
    Column("flicker", "levels", 1),
    Column("dynamic degree", "px/frame", 2),
)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to run the bundle. steps: None for the bundle's own."""

    name: str
    steps: int | None = None
    solver: Solver = "euler"
    leap: Leap = dataclasses.field(default_factory=lambda: Leap("none"))
    merged_share: float = 0.0  # of the steps
    memory_limit_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Made:
    """A clip that a method made, what its run took, and how good it is."""

    frames: np.ndarray  # uint8 [T, H, W, 3]
    seconds: float
    denoise_seconds: float
    evaluations: int
    peak_rss_bytes: int
    streams: bool  # whether the denoiser's programs did not all stay in memory
    right: bool  # as the caption says
    psnr_db: float | None  # None: of the reference itself, or equal to it
    ssim: float | None
    flicker: float
    dynamic_degree: float


def techniques(steps: int, memory_limit_bytes: int) -> list[Method]:
    """Each technique alone, those of the paper together, and the fastest, in memory and with its blocks streamed.

    steps: of the bundle.
    """
    leap = Leap("fixed", share_of(steps, LEAP_SHARE))
    few = Method(FASTEST, share_of(steps, FEW_SHARE), "ab2", merged_share=MERGED_SHARE)
    return [
        dataclasses.replace(few, name=FEWER, merged_share=0.0),
        Method(LEAP, leap=leap),
        Method(MERGED, merged_share=MERGED_SHARE),
        Method(STREAMED, memory_limit_bytes=memory_limit_bytes),
        Method(PAPERS, leap=leap, merged_share=MERGED_SHARE, memory_limit_bytes=memory_limit_bytes),
        few,
        dataclasses.replace(few, name=TOGETHER, memory_limit_bytes=memory_limit_bytes),
    ]


def share_of(steps: int, share: float) -> int:
    """So many of the steps, one at least."""
    return max(1, round(share * steps))


def demonstrate(
    output: pathlib.Path, exporter: Exporter, model: str, captions: int = CAPTIONS, *, command: str = ""
) -> Report:
    """Do it all and write the bundle, the clips and the reports to `output`. Raises EdgerunError as the stages do.

    model: a text-to-video checkpoint that reads the captions of edgerun.evaluation.clips.
    """
    from edgerun.evaluation import clips
    from edgerun.video_file import check_path, write_clip

    checkpoint, clock = checkpoint_path(model), Clock(say=True)
    make_folder(output)
    check_path(output / "plain_0.mp4")  # before a minute of work
    print(
        "edgerun demo video: captions become clips, plain and with the techniques alone and together", file=sys.stderr
    )
    with clock.step("export, a program for every block"), stage_bar("export") as progress:
        bundle = exporter.export_video_bundle(
            checkpoint, RECIPE, output / BUNDLE, overwrite=True, parallel=True, progress=progress
        )
    video = bundle.manifest["video"]
    wanted, fps = clips.prompts(captions, CAPTIONS_SEED), float(video["fps"])
    made: dict[str, list[Made]] = {}

    limit: int | None = None
    for seed, clip in enumerate(wanted):  # caption by caption, so that what else the machine does falls on all methods
        with clock.step(f"caption {seed + 1} of {len(wanted)}, every way"):
            for method in (Method(REFERENCE, steps=REFERENCE_STEPS), Method(PLAIN)):
                best = made[REFERENCE][seed].frames if method.steps is None else None
                made.setdefault(method.name, []).append(_measured(_run(bundle, clip, seed, method), clip, best))
            limit = limit or int(LIMIT_SHARE * made[PLAIN][0].peak_rss_bytes)
            best = made[REFERENCE][seed].frames
            for method in techniques(int(video["steps"]), limit):
                made.setdefault(method.name, []).append(_measured(_run(bundle, clip, seed, method), clip, best))
    assert limit is not None
    shown: list[MovingPicture] = []
    for index, clip in enumerate(wanted):
        for name, all_made in made.items():
            shown.append(_picture(name, all_made[index], fps, clip.caption()))
            if name in (PLAIN, TOGETHER):
                write_clip(all_made[index].frames, fps, output / f"{name.replace(', ', '_').lower()}_{index}.mp4")
    report = dataclasses.replace(
        begin_report("demo", "edgerun demo video: captions become clips", command),
        verdict=_verdict(made),
        facts=_facts(model, bundle, limit),
        tables=(Table("Ways to sample", _COLUMNS, tuple(_row(name, of) for name, of in made.items()), _note(video)),),
        checks=_checks(made, limit),
        clips=tuple(shown),
        steps=tuple(clock.steps),
    )
    write_json(report, output / VALUES)
    write_html(report, output / PAGE)
    return report


def _run(bundle: Bundle, clip: Clip, seed: int, method: Method) -> VideoRunReport:
    """In a process of its own, so that its peak RSS is the run's."""
    from edgerun.commands.video import prompt_tokenizer, prompt_tokens
    from edgerun.devices import VideoRunRequest, open_device

    own = bundle.manifest["video"]["times"]
    times = own if method.steps is None else respaced(own, method.steps)
    request = VideoRunRequest(
        tokens=prompt_tokens(prompt_tokenizer(bundle), clip.caption()),
        seed=seed,
        times=tuple(times),
        solver=method.solver,
        leap=method.leap,
        merge_steps=round(method.merged_share * len(times)),
        memory_limit_bytes=method.memory_limit_bytes,
    )
    return open_device("host").run(bundle.path, request)


def _tensor(frames: np.ndarray) -> torch.Tensor:
    """The clip as the measures take it: float32 [3, T, H, W] in [-1, 1]."""
    import torch

    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def _measured(report: VideoRunReport, wanted: Clip, best: np.ndarray | None) -> Made:
    """best: the reference's frames."""
    from edgerun.evaluation import clip_detectors, video_quality

    frames, run = report.clip.frames, report.clip.report
    video = _tensor(frames)
    seconds = {name: run["stages"][name]["wall_ms"] / 1e3 for name in ("encode", "denoise", "decode")}
    chain = run["stages"]["denoise"]["chain"]
    differs = best is not None and not np.array_equal(frames, best)
    return Made(
        frames=frames,
        seconds=sum(seconds.values()),
        denoise_seconds=seconds["denoise"],
        evaluations=report.clip.evaluations,
        peak_rss_bytes=run["peak_rss_bytes"],
        streams=chain["resident_blocks"] < len(chain["blocks"]),
        right=clip_detectors.agreement(clip_detectors.detect(video), wanted).all,
        psnr_db=video_quality.psnr(video, _tensor(best)) if best is not None and differs else None,
        ssim=video_quality.ssim(video, _tensor(best)) if best is not None and differs else None,
        flicker=video_quality.temporal_flicker(video),
        dynamic_degree=video_quality.dynamic_degree(video),
    )


def _row(name: str, made: list[Made]) -> tuple[Cell, ...]:
    def mean(of: str) -> float | None:
        known = [getattr(one, of) for one in made if getattr(one, of) is not None]
        return statistics.fmean(known) if known else None

    def seconds(of: str) -> Estimate:
        values = [getattr(one, of) for one in made]
        return Estimate(statistics.fmean(values), min(values), max(values), n=len(values))

    return (
        name,
        seconds("seconds"),
        seconds("denoise_seconds"),
        mean("evaluations"),
        max(one.peak_rss_bytes for one in made) / 2**20,
        f"{sum(one.right for one in made)} of {len(made)}",
        mean("psnr_db"),
        mean("ssim"),
        mean("flicker"),
        mean("dynamic_degree"),
    )


def _checks(made: dict[str, list[Made]], limit: int) -> tuple[Check, ...]:
    """Programs stream, which changes nothing, and holds the limit."""
    pairs = zip(made[PLAIN], made[STREAMED], strict=True)
    levels = max(compare.max_abs(streamed.frames, plain.frames) for plain, streamed in pairs)
    limited = [one for name in (STREAMED, PAPERS, TOGETHER) for one in made[name]]
    peak, streamed = max(one.peak_rss_bytes for one in limited), sum(one.streams for one in limited)
    return (
        Check("runs with a limit whose programs stream", streamed, len(limited), True, streamed == len(limited)),
        Check("streamed against plain: largest difference in levels", levels, 0.0, False, levels == 0.0),
        Check("peak RSS with a limit, in bytes", float(peak), float(limit), False, peak <= limit),
    )


def _picture(name: str, made: Made, fps: float, caption: str) -> MovingPicture:
    from edgerun.clip_picture import moving_picture

    note = "" if made.right else "not as the caption says"
    return moving_picture(name, made.frames, fps, alt=f"{name}, made for: {caption}", group=caption, note=note)


def _verdict(made: dict[str, list[Made]]) -> str:
    def mean(name: str, of: str) -> float:
        return statistics.fmean(getattr(one, of) for one in made[name])

    def peak(name: str) -> float:
        return max(one.peak_rss_bytes for one in made[name]) / 2**20

    def speed(name: str) -> str:
        return f"{mean(PLAIN, 'denoise_seconds') / mean(name, 'denoise_seconds'):.2f} times"

    right = {name: sum(one.right for one in made[name]) for name in (PLAIN, TOGETHER)}
    count = len(made[PLAIN])
    evaluations = f"{mean(TOGETHER, 'evaluations'):g} evaluations instead of {mean(PLAIN, 'evaluations'):g}"
    memory = f"{peak(TOGETHER):.0f} MiB instead of {peak(PLAIN):.0f} MiB"
    return (
        f"Second-order steps (ab2) with TDTM denoise {speed(FASTEST)} as fast as plain sampling, {evaluations}. Their "
        f"blocks streamed too, they are {speed(TOGETHER)} as fast in a process of {memory}. {right[TOGETHER]} of "
        f"{count} {'clip is' if count == 1 else 'clips are'} what the caption says, of plain sampling {right[PLAIN]}. "
        f"{'One caption' if count == 1 else f'Means of {count} captions'}; "
        "bench/workloads/video_quality.py measures quality with intervals."
    )


def _facts(model: str, bundle: Bundle, limit: int) -> tuple[tuple[str, Cell], ...]:
    from edgerun.commands.video import sampler_text

    video = bundle.manifest["video"]
    return (
        ("model", model),
        ("clip", f"{video['frames']} frames of {video['height']} x {video['width']}, {video['fps']:g} a second"),
        ("plain sampling", sampler_text(video)),
        ("ab2", f"{share_of(video['steps'], FEW_SHARE)} second-order steps (Adams-Bashforth)"),
        ("LPL", f"linear proportional leap after {share_of(video['steps'], LEAP_SHARE)} evaluations"),
        ("TDTM", f"temporal token merging in {MERGED_SHARE:.0%} of the steps"),
        ("memory limit where programs stream", f"{limit / 2**20:.1f} MiB, {LIMIT_SHARE:.0%} of plain sampling's peak"),
        ("programs", sum(len(names) for names in bundle.manifest["chains"].values())),
    )


def _note(video: dict[str, Any]) -> str:
    return (
        "Means over the captions, times with their range, peak RSS the largest. A caption's noise is the same for "
        "all. PSNR and SSIM are against the reference's clip; colour, shape and motion are read back from the pixels. "
        f"{video['steps']} Euler steps where nothing else is said. With a limit, programs are loaded when they are "
        "needed, here from the page cache, and the whole process stays below it; without, all of a stage are in memory."
    )
