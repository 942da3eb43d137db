"""What each way of sampling costs in evaluations and in quality, on a text-to-video checkpoint of generated clips.

    python bench/workloads/video_quality.py --checkpoint FOLDER --work FOLDER [--prompts 100]

Every method starts from the same noise and prompt. Its clip is held against the clip of a reference of 200 Euler steps
(PSNR, SSIM), read by the detectors (colour, shape and motion all right), and measured for flicker and for how much
moves. The loss of a method is PSNR(plain) - PSNR(method), its mean over the prompts with a paired 95 % interval. `ab2`
is the second-order sampler (edgerun/models/rectified_flow.py) with so few steps that it evaluates as seldom. Rivals are
re-spaced Euler and step caching with as many evaluations as each rule takes on average, whose threshold is found on
other prompts. Nothing is timed: evaluations are counted, and video_speed.py times a bundle. A row is written when a
method is complete; references and clips stay in --work; the same command goes on after a stop. What it means is
printed, and written as a page with clips side by side (bench/video_quality_page.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from bench.harness import RESULTS, ResultFile, commit
from bench.video_quality_page import MEASURES, PLAIN, quality_report
from edgerun.errors import EdgerunError
from edgerun.evaluation import clip_detectors, clips, video_quality
from edgerun.library_noise import quiet_libraries
from edgerun.models import rectified_flow
from edgerun.models.rectified_flow import Sampled, StepRule
from edgerun.models.solvers import Solver
from edgerun.models.text_to_video import VideoCheckpoint
from edgerun.report import MovingPicture, to_text
from edgerun.report_html import write_html
from edgerun.techniques.linear_proportional_leap import CosineLeap, FixedLeap
from edgerun.techniques.step_caching import StepCaching
from edgerun.techniques.temporal_token_merging import (
    PAPER_PARTS,
    PARTS,
    FrameMerge,
    adjacent_groups,
    frame_merge,
    similar_groups,
)

SEED = 2026
PILOT_SEED, PILOT_PROMPTS, HALVINGS = 2027, 6, 7  # for the threshold of step caching
SHOWN = 1  # prompts whose clips are on the page, 5 MB each
PAIRS, PAIRS_AND_MLP, SIMILAR = "pairs", "pairs, feed-forward too", "similar pairs"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: the settings that a result file belongs to."""

    checkpoint: str  # sha256
    prompts: int
    steps: int  # of the plain run
    reference_steps: int
    evaluations: int  # of the fixed leap, re-spaced Euler and step caching
    solver_steps: tuple[int, ...]  # of the second-order sampler; `evaluations` beside them
    merged_solver_steps: int  # of it with TDTM
    latest_times: tuple[float, ...]  # of the cosine rule
    merge_steps: tuple[int, ...]
    least_cosine: float  # of frames that count as similar
    threads: int

    def methods(self) -> list[Method]:
        """Plain sampling first: the others are compared with it."""
        steps, few, longest = self.steps, self.evaluations, max(self.merge_steps, default=0)
        found = [
            Method(PLAIN, steps),
            Method(f"LPL after {few}", steps, lambda: FixedLeap(few)),
            *(Method(f"LPL, cosine from {t:g}", steps, lambda t=t: CosineLeap(t)) for t in self.latest_times),
            *(Method(f"TDTM, {count} steps", steps, merge_steps=count) for count in self.merge_steps),
        ]
        if longest:
            more = ((kind, f"TDTM, {longest} steps, {kind}") for kind in (PAIRS_AND_MLP, SIMILAR))
            found += [Method(name, steps, merge_steps=longest, merge=kind) for kind, name in more]
        found += [
            Method(f"ab2, {count} steps", count, solver="ab2")
            for count in sorted({few, *self.solver_steps}, reverse=True)
        ]
        for count in self.merge_steps:
            name = f"LPL after {few} and TDTM, {count} steps"
            found.append(Method(name, steps, lambda: FixedLeap(few), count))
        fewer = self.merged_solver_steps
        for share in sorted({merged_share(count, steps, fewer) for count in self.merge_steps}):
            name = f"ab2, {fewer} steps and TDTM, {share} steps"
            found.append(Method(name, fewer, merge_steps=share, solver="ab2"))
        return found


def merged_share(count: int, steps: int, fewer: int) -> int:
    """Of `fewer` steps, as many as `count` are of `steps`."""
    return max(1, round(fewer * count / steps))


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to sample."""

    name: str
    steps: int
    rule: Callable[[], StepRule] | None = None  # makes one for each sample; None: plain Euler
    merge_steps: int = 0  # first steps whose frames are merged
    merge: str = PAIRS
    solver: Solver = "euler"


class Sampler:
    """The checkpoint's models, and one clip at a time from them."""

    def __init__(self, checkpoint: VideoCheckpoint, least_cosine: float = 0.9) -> None:
        self.least_cosine = least_cosine
        self.similar_frames: list[int] = []  # computed in each merged step of similar pairs
        self.settings = checkpoint.settings
        self.denoiser = checkpoint.load_denoiser()
        self.autoencoder = checkpoint.load_autoencoder()
        self.text = checkpoint.load_text_encoder()
        config = checkpoint.autoencoder
        latents = config.latent_frames(self.settings.frames)
        size = (self.settings.height // config.spatial_factor, self.settings.width // config.spatial_factor)
        self.shape = (1, config.latent_channels, latents, *size)
        pairs = adjacent_groups(latents)
        parts = {PAIRS: frozenset(PAPER_PARTS), PAIRS_AND_MLP: frozenset(PARTS)}
        self.merges = {kind: frame_merge(pairs, of) for kind, of in parts.items()}
        chunk = (config.frames_per_chunk, config.temporal_factor)
        pixels = (self.settings.height, self.settings.width)
        self.ratio = rectified_flow.shift_ratio(pixels, self.settings.frames, self.settings.schedule_base, chunk)

    @torch.inference_mode()
    def latents(self, caption: str, seed: int, method: Method) -> Sampled:
        """The latents of a caption; the noise depends on the seed alone."""
        noise = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))
        prompt = self.text.encode(caption)
        both = torch.cat([prompt, self.denoiser.null_caption(prompt.shape[1])[None]])
        schedule = rectified_flow.times(method.steps, self.ratio)
        merged_until = schedule[method.merge_steps] if method.merge_steps < len(schedule) else -1.0

        def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
            merge = self.merge(method.merge, x, t) if t > merged_until and method.merge_steps > 0 else None
            found = self.denoiser(
                torch.cat([x, x]),
                torch.full((2,), t),
                both,
                fps=self.fps(2),
                pixels=self.pixels,
                merge=merge,
            )
            return rectified_flow.guide(*found.chunk(2), self.settings.guidance)

        rule = method.rule() if method.rule is not None else None
        return rectified_flow.sample(velocity, noise, schedule, rule, solver=method.solver)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width."""
        return self.settings.height, self.settings.width

    def fps(self, count: int) -> torch.Tensor:
        """[count]."""
        return torch.full((count,), float(self.settings.fps))

    def merge(self, kind: str, x: torch.Tensor, t: float) -> FrameMerge:
        """The frames to compute together for latents x at t."""
        if kind != SIMILAR:
            return self.merges[kind]
        tokens = self.denoiser.embed(x, torch.full((1,), t), self.fps(1), self.pixels)[0]
        found = frame_merge(similar_groups(tokens, self.least_cosine))
        self.similar_frames.append(len(found.positions))
        return found

    @torch.inference_mode()
    def clip(self, latents: torch.Tensor) -> torch.Tensor:
        """[3, T, H, W] in [-1, 1]."""
        decoded: torch.Tensor = self.autoencoder.decode(latents, self.settings.frames)[0].float().clamp(-1, 1)
        return decoded


def run(checkpoint: VideoCheckpoint, plan: Plan, work: pathlib.Path, results: ResultFile) -> list[MovingPicture]:
    """Measure every method that the results lack. Returns clips of the first prompts, side by side."""
    torch.set_num_threads(plan.threads)
    sampler = Sampler(checkpoint, plan.least_cosine)
    wanted = clips.prompts(plan.prompts, SEED)
    references = [
        sampler.clip(reference(sampler, plan, clip.caption(), index, work))
        for index, clip in enumerate(tqdm(wanted, desc="references", disable=None))
    ]
    methods = plan.methods()
    for method in methods:
        measure_missing(sampler, method, wanted, references, results)
    # Rivals of equal evaluations: what each rule takes on average, rounded up.
    rules = [method for method in methods if method.rule is not None and not method.merge_steps]
    rows = [results.find({"kind": "method", "method": method.name}) for method in rules]
    means = [sum(row["evaluations"]) / len(row["evaluations"]) for row in rows if row is not None]
    for count in sorted({math.ceil(mean) for mean in means} - {plan.steps}):
        threshold = threshold_of(sampler, plan, count, results)
        caching = Method(
            f"step caching at {count}", plan.steps, lambda threshold=threshold: StepCaching(plan.steps, threshold)
        )
        for rival in (Method(f"Euler, {count} steps", count), caching):
            methods.append(rival)
            measure_missing(sampler, rival, wanted, references, results)
    pictures = []
    for index, clip in enumerate(wanted[:SHOWN]):
        shown = [("reference", references[index])]
        shown += [(one.name, sampler.clip(latents_of(sampler, plan, one, clip, index, work))) for one in methods]
        pictures += [picture(name, video, checkpoint.settings.fps, clip.caption()) for name, video in shown]
    return pictures


def threshold_of(sampler: Sampler, plan: Plan, count: int, results: ResultFile) -> float:
    """The threshold of step caching that takes nearest to `count` evaluations on average, by bisection over pilots."""
    row = results.find({"kind": "threshold", "count": count})
    if row is None:
        pilots = [clip.caption() for clip in clips.prompts(PILOT_PROMPTS, PILOT_SEED)]
        low, high, tried = 1e-3, 1.0, []
        for _ in tqdm(range(HALVINGS), desc=f"step caching at {count}: threshold", disable=None):
            middle = math.sqrt(low * high)
            method = Method("", plan.steps, lambda middle=middle: StepCaching(plan.steps, middle))
            counts = [sampler.latents(caption, seed, method).evaluations for seed, caption in enumerate(pilots)]
            mean = sum(counts) / len(counts)
            tried.append((abs(mean - count), middle, mean))
            low, high = (middle, high) if mean > count else (low, middle)
        _, threshold, mean = min(tried)
        results.add({"kind": "threshold", "count": count, "threshold": threshold, "mean_evaluations": mean})
        return threshold
    return float(row["threshold"])


def measure_missing(
    sampler: Sampler,
    method: Method,
    wanted: list[clips.Clip],
    references: list[torch.Tensor],
    results: ResultFile,
) -> None:
    """Add the row of a method, where it is not there."""
    key = {"kind": "method", "method": method.name}
    if results.find(key) is None:
        results.add({**key, **measure(sampler, method, wanted, references)})


def latents_of(
    sampler: Sampler, plan: Plan, method: Method, clip: clips.Clip, index: int, work: pathlib.Path
) -> torch.Tensor:
    """What a method makes of a prompt, from `work` where it is of the same plan and code."""
    whole = hashlib.sha256(repr((plan, commit(), method.name, index)).encode()).hexdigest()[:24]
    path = work / f"clip_{whole}.pt"
    return kept(path, lambda: sampler.latents(clip.caption(), index, method).latents)


def picture(name: str, video: torch.Tensor, fps: float, caption: str) -> MovingPicture:
    """A clip [3, T, H, W] in [-1, 1] for the page."""
    from edgerun.clip_picture import moving_picture

    frames = ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous().numpy()
    return moving_picture(name, frames, float(fps), alt=f"{name}: {caption}", group=caption)


def kept(path: pathlib.Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor in a file, which is made where it is not there."""
    if path.is_file():
        found: torch.Tensor = torch.load(path, weights_only=True)
        return found
    made = make().clone()
    unfinished = path.with_suffix(".tmp")
    torch.save(made, unfinished)
    unfinished.replace(path)
    return made


def reference(sampler: Sampler, plan: Plan, caption: str, index: int, work: pathlib.Path) -> torch.Tensor:
    """The latents of the reference run, from `work` where they are."""
    path = work / f"reference_{plan.checkpoint[:16]}_{plan.reference_steps}_{index}.pt"
    method = Method("reference", plan.reference_steps)
    return kept(path, lambda: sampler.latents(caption, index, method).latents)


def measure(
    sampler: Sampler, method: Method, wanted: list[clips.Clip], references: list[torch.Tensor]
) -> dict[str, Any]:
    """Every measure of every prompt's clip."""
    found: dict[str, list[float]] = {name: [] for name in ("evaluations", "right", *MEASURES)}
    sampler.similar_frames.clear()
    for index, clip in enumerate(tqdm(wanted, desc=method.name, disable=None)):
        sampled = sampler.latents(clip.caption(), index, method)
        video, best = sampler.clip(sampled.latents), references[index]
        found["evaluations"].append(sampled.evaluations)
        found["right"].append(float(clip_detectors.agreement(clip_detectors.detect(video), clip).all))
        found["psnr"].append(video_quality.psnr(video, best))
        found["ssim"].append(video_quality.ssim(video, best))
        found["flicker"].append(video_quality.temporal_flicker(video))
        found["dynamic"].append(video_quality.dynamic_degree(video))
    if sampler.similar_frames:
        found["similar_frames"] = [float(count) for count in sampler.similar_frames]
    return found


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Those that video_speed.py has too."""
    parser.add_argument(
        "--solver-steps",
        type=int,
        nargs="*",
        default=[16, 14, 12, 10],
        help="of the second-order sampler, beside --evaluations; default: %(default)s",
    )
    parser.add_argument(
        "--merged-solver-steps", type=int, default=16, help="of it with merged frames; default: %(default)s"
    )
    parser.add_argument("--merge-steps", type=int, nargs="*", default=[5, 10, 15, 20, 30], help="default: %(default)s")


def check_step_counts(parser: argparse.ArgumentParser, given: argparse.Namespace, steps: int) -> None:
    """Ends the program for counts that are below 1 or above the steps of plain sampling."""
    counts = (given.evaluations, given.merged_solver_steps, *given.solver_steps, *given.merge_steps)
    if min(steps, *counts) < 1 or max(counts) > steps:
        parser.error(f"counts are at least 1, and those of evaluations and steps at most the {steps} steps")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True, help="a text-to-video folder")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="where references are kept")
    parser.add_argument("--prompts", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=None, help="of the plain run; default: the checkpoint's")
    parser.add_argument("--reference-steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument(
        "--evaluations", type=int, default=19, help="of fixed leap, Euler and caching; default: %(default)s"
    )
    add_method_options(parser)
    parser.add_argument(
        "--latest-times",
        type=float,
        nargs="*",
        default=[0.5, 0.6, 0.7],
        help="of the cosine rule; default: %(default)s",
    )
    parser.add_argument("--least-cosine", type=float, default=0.9, help="of similar frames; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "video_quality.json")
    parser.add_argument("--fresh", action="store_true", help="measure every method anew")
    given = parser.parse_args(arguments)
    quiet_libraries()
    try:
        checkpoint = VideoCheckpoint.open(given.checkpoint)
        steps = checkpoint.settings.steps if given.steps is None else given.steps
        check_step_counts(parser, given, steps)
        if given.prompts < 1:
            parser.error(f"--prompts is {given.prompts}; give at least 1")
        if given.reference_steps <= steps:
            parser.error(
                f"the reference has {given.reference_steps} steps; give it more than the {steps} of plain sampling"
            )
        if not all(0.0 < time <= 1.0 for time in given.latest_times) or not -1.0 <= given.least_cosine <= 1.0:
            parser.error(
                f"--latest-times are {given.latest_times} and --least-cosine {given.least_cosine}; times are above 0 "
                "and at most 1, cosines from -1 to 1"
            )
        plan = Plan(
            checkpoint.sha256(),
            given.prompts,
            steps,
            given.reference_steps,
            given.evaluations,
            tuple(given.solver_steps),
            given.merged_solver_steps,
            tuple(given.latest_times),
            tuple(given.merge_steps),
            given.least_cosine,
            given.threads,
        )
        command = " ".join(
            ["python", "bench/workloads/video_quality.py", *(sys.argv[1:] if arguments is None else arguments)]
        )
        results = ResultFile(given.output, command, dataclasses.asdict(plan), fresh=given.fresh)
        given.work.mkdir(parents=True, exist_ok=True)
        pictures = run(checkpoint, plan, given.work, results)
        report = quality_report(results.rows, plan.evaluations, plan.merge_steps, pictures, command)
        write_html(report, given.output.with_suffix(".html"))
        print(to_text(report, colour=sys.stdout.isatty()), end="", flush=True)
    except EdgerunError as error:
        sys.exit(f"error: {error}")
    print(f"\nwrote {given.output} and {given.output.with_suffix('.html').name}")


if __name__ == "__main__":
    main()
