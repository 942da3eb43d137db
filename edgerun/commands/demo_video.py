"""The video half of `edgerun demo`: a caption becomes a clip, plain and with every technique, side by side."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgerun.commands.common import Clock, Exporter, begin_report, checkpoint_path, stage_bar
from edgerun.report import Cell, Column, MovingPicture, Report, Table, write_json
from edgerun.report_html import write_html
from edgerun.sessions.video import Leap
from edgerun.video_recipe import VideoRecipe

if TYPE_CHECKING:
    import torch

    from edgerun.bundle import Bundle
    from edgerun.devices import VideoRunReport
    from edgerun.evaluation.clips import Clip

MODEL = "zoo:video"
RECIPE = VideoRecipe(leap="fixed", leap_evaluations=19, merge_steps=30, merge_possible=True)
PROMPTS_SEED, NOISE_SEED = 7, 0
REFERENCE_STEPS = 200
MEMORY_LIMIT_BYTES = 64 * 10**6
BUNDLE, PAGE, VALUES = "video.edgerun", "report.html", "report.json"

_COLUMNS = (
    Column("method"),
    Column("time", "s", 2),
    Column("denoising", "s", 2),
    Column("NFE"),
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
    leap: Leap = dataclasses.field(default_factory=lambda: Leap("none"))
    merge_steps: int = 0
    steps: int | None = None
    memory_limit_bytes: int | None = None

    @property
    def file_name(self) -> str:
        """Of the method's clip."""
        return "".join(letter if letter.isalnum() else "_" for letter in self.name.lower()) + ".mp4"


def methods(video: dict[str, Any]) -> list[Method]:
    """The reference, plain sampling, each technique of a manifest's "video" alone, and all of them."""
    leap = Leap(**{field.name: video["leap"][field.name] for field in dataclasses.fields(Leap)})
    merged = video["merge"]["steps"] if "merge" in video else 0
    streamed = f"blocks in {MEMORY_LIMIT_BYTES // 10**6} MB"
    found = [Method(f"reference, {REFERENCE_STEPS} steps", steps=REFERENCE_STEPS), Method("plain")]
    if leap.kind != "none":
        found.append(Method("LPL", leap))
    if merged:
        found.append(Method("TDTM", merge_steps=merged))
    found.append(Method(streamed, memory_limit_bytes=MEMORY_LIMIT_BYTES))
    return [*found, Method("all together", leap, merged, None, MEMORY_LIMIT_BYTES)]


def respaced(times: Sequence[float], steps: int) -> list[float]:
    """`steps` times of the same schedule (edgerun/models/rectified_flow.py) as `times`, of which there are two or more.

    The schedule's ratio is read from the second time.
    """
    from edgerun.models import rectified_flow

    u = 1.0 - 1.0 / len(times)
    return rectified_flow.times(steps, times[1] * (1.0 - u) / (u * (1.0 - times[1])))


def demonstrate(output: pathlib.Path, exporter: Exporter, *, command: str = "", model: str = MODEL) -> Report:
    """Do it all and write the bundle, the clips and the reports to `output`. Raises EdgerunError as the stages do."""
    from edgerun.evaluation import clips
    from edgerun.video_file import write_clip

    output.mkdir(parents=True, exist_ok=True)
    checkpoint, clock = checkpoint_path(model), Clock(say=True)
    print("edgerun demo video: a caption becomes a clip, plain and with every technique", file=sys.stderr)
    with clock.step("export, a program for every block"), stage_bar("export") as progress:
        bundle = exporter.export_video_bundle(checkpoint, RECIPE, output / BUNDLE, overwrite=True, progress=progress)
    video = bundle.manifest["video"]
    (wanted,) = clips.prompts(1, PROMPTS_SEED)
    caption, fps = wanted.caption(), float(video["fps"])
    rows: list[tuple[Cell, ...]] = []
    shown: list[MovingPicture] = []
    best: torch.Tensor | None = None
    for method in methods(video):
        with clock.step(method.name):
            made = _run(bundle, caption, method)
        best = _tensor(made) if best is None else best
        rows.append((method.name, *_measured(made, wanted, best, reference=method.steps is not None)))
        write_clip(made.clip.frames, fps, output / method.file_name)
        shown.append(_picture(method.name, made, fps, caption))
    report = dataclasses.replace(
        begin_report("demo", "edgerun demo video: a caption becomes a clip", command),
        verdict=_verdict(rows),
        facts=_facts(model, bundle, caption),
        tables=(Table("Ways to sample", _COLUMNS, tuple(rows), _note(video)),),
        clips=tuple(shown),
        steps=tuple(clock.steps),
    )
    write_json(report, output / VALUES)
    write_html(report, output / PAGE)
    return report


def _run(bundle: Bundle, caption: str, method: Method) -> VideoRunReport:
    """In a process of its own, so that its peak RSS is the run's."""
    from edgerun.commands.video import prompt_tokenizer, prompt_tokens
    from edgerun.devices import VideoRunRequest, open_device

    request = VideoRunRequest(
        tokens=prompt_tokens(prompt_tokenizer(bundle), caption),
        seed=NOISE_SEED,
        times=None if method.steps is None else tuple(respaced(bundle.manifest["video"]["times"], method.steps)),
        leap=method.leap,
        merge_steps=method.merge_steps,
        memory_limit_bytes=method.memory_limit_bytes,
    )
    return open_device("host").run(bundle.path, request)


def _tensor(made: VideoRunReport) -> torch.Tensor:
    """The clip as the measures take it: float32 [3, T, H, W] in [-1, 1]."""
    import torch

    return torch.from_numpy(made.clip.frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def _measured(made: VideoRunReport, wanted: Clip, best: torch.Tensor, *, reference: bool) -> tuple[Cell, ...]:
    from edgerun.evaluation import clip_detectors, video_quality

    clip, run = _tensor(made), made.clip.report
    seconds = {name: run["stages"][name]["wall_ms"] / 1e3 for name in ("encode", "denoise", "decode")}
    return (
        sum(seconds.values()),
        seconds["denoise"],
        made.clip.evaluations,
        run["peak_rss_bytes"] / 2**20,
        clip_detectors.agreement(clip_detectors.detect(clip), wanted).all,
        None if reference else video_quality.psnr(clip, best),
        None if reference else video_quality.ssim(clip, best),
        video_quality.temporal_flicker(clip),
        video_quality.dynamic_degree(clip),
    )


def _picture(name: str, made: VideoRunReport, fps: float, caption: str) -> MovingPicture:
    from edgerun.clip_picture import moving_picture

    return moving_picture(name, made.clip.frames, fps, alt=f"{name}: {caption}", group=caption)


def _verdict(rows: list[tuple[Cell, ...]]) -> str:
    plain, together = (next(row for row in rows if row[0] == name) for name in ("plain", "all together"))
    assert isinstance(plain[2], float) and isinstance(together[2], float)
    return (
        f"All techniques together denoise {plain[2] / together[2]:.2f} times as fast as plain sampling, "
        f"{together[3]} evaluations instead of {plain[3]}, in a process of {together[4]:.0f} MiB instead of "
        f"{plain[4]:.0f} MiB; the clip is {'' if together[5] else 'not '}what the caption says."
    )


def _facts(model: str, bundle: Bundle, caption: str) -> tuple[tuple[str, Cell], ...]:
    from edgerun.commands.video import leap_text, merge_text

    video = bundle.manifest["video"]
    return (
        ("model", model),
        ("caption", caption),
        ("clip", f"{video['frames']} frames of {video['height']} x {video['width']}, {video['fps']:g} a second"),
        ("sampler", f"{video['steps']} steps, guidance {video['guidance']:g}"),
        ("techniques", f"LPL {leap_text(video['leap'])}, {merge_text(video)}"),
        ("programs", sum(len(names) for names in bundle.manifest["chains"].values())),
    )


def _note(video: dict[str, Any]) -> str:
    return (
        "The same noise for all. PSNR and SSIM are against the reference's clip; colour, shape and motion are read "
        f"back from the pixels. {video['steps']} steps but for the reference. With a limit, programs stream from the "
        "disk and the whole process stays below it; without, every program is in memory."
    )
