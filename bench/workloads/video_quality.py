"""What each way of sampling costs in evaluations and in quality, on a text-to-video checkpoint of generated clips.

    python bench/workloads/video_quality.py --checkpoint FOLDER --work FOLDER [--prompts 100]

Every method starts from the same noise and prompt. Its clip is held against the clip of a reference of 200 Euler steps
(PSNR, SSIM), read by the detectors (colour, shape and motion all right), and measured for flicker and for how much
moves. The loss of a method is PSNR(plain) - PSNR(method), its mean over the prompts with a paired 95 % interval; rivals
are re-spaced Euler and step caching. Nothing is timed: evaluations are counted, and `edgerun bench` times a bundle.
A row is written when a method is complete; references stay in --work; the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from bench.harness import RESULTS, ResultFile, Row
from edgerun.errors import EdgerunError
from edgerun.evaluation import clip_detectors, clips, video_quality
from edgerun.evaluation.statistics import paired_difference, wilson_interval
from edgerun.library_noise import quiet_libraries
from edgerun.models import rectified_flow
from edgerun.models.rectified_flow import Sampled, StepRule
from edgerun.models.text_to_video import VideoCheckpoint
from edgerun.techniques.linear_proportional_leap import CosineLeap, FixedLeap
from edgerun.techniques.step_caching import StepCaching
from edgerun.techniques.temporal_token_merging import FrameMerge, adjacent_groups, frame_merge

SEED = 2026
PLAIN = "plain"
MEASURES = ("psnr", "ssim", "flicker", "dynamic")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: the settings that a result file belongs to."""

    checkpoint: str  # sha256
    prompts: int
    steps: int  # of the plain run
    reference_steps: int
    evaluations: int  # of the fixed leap and of re-spaced Euler
    merge_steps: tuple[int, ...]
    thresholds: tuple[float, ...]  # of step caching
    threads: int

    def methods(self) -> list[Method]:
        """Plain sampling first: the others are compared with it."""
        steps, few, longest = self.steps, self.evaluations, max(self.merge_steps, default=0)
        return [
            Method(PLAIN, steps),
            Method(f"Euler, {few} steps", few),
            Method("LPL, cosine rule", steps, CosineLeap),
            Method(f"LPL after {few}", steps, lambda: FixedLeap(few)),
            *(Method(f"step caching, {t:g}", steps, lambda t=t: StepCaching(steps, t)) for t in self.thresholds),
            *(Method(f"TDTM, {count} steps", steps, merge_steps=count) for count in self.merge_steps),
            *([Method(f"LPL, cosine rule, and TDTM, {longest} steps", steps, CosineLeap, longest)] if longest else []),
        ]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to sample."""

    name: str
    steps: int
    rule: Callable[[], StepRule] | None = None  # makes one for each sample; None: plain Euler
    merge_steps: int = 0  # first steps whose frames are merged in pairs


class Sampler:
    """The checkpoint's models, and one clip at a time from them."""

    def __init__(self, checkpoint: VideoCheckpoint) -> None:
        self.settings = checkpoint.settings
        self.denoiser = checkpoint.load_denoiser()
        self.autoencoder = checkpoint.load_autoencoder()
        self.text = checkpoint.load_text_encoder()
        config = checkpoint.autoencoder
        latents = config.latent_frames(self.settings.frames)
        size = (self.settings.height // config.spatial_factor, self.settings.width // config.spatial_factor)
        self.shape = (1, config.latent_channels, latents, *size)
        self.merge = frame_merge(adjacent_groups(latents))
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
            merge: FrameMerge | None = self.merge if t > merged_until and method.merge_steps > 0 else None
            found = self.denoiser(
                torch.cat([x, x]),
                torch.full((2,), t),
                both,
                fps=torch.full((2,), float(self.settings.fps)),
                pixels=(self.settings.height, self.settings.width),
                merge=merge,
            )
            return rectified_flow.guide(*found.chunk(2), self.settings.guidance)

        return rectified_flow.sample(velocity, noise, schedule, method.rule() if method.rule is not None else None)

    @torch.inference_mode()
    def clip(self, latents: torch.Tensor) -> torch.Tensor:
        """[3, T, H, W] in [-1, 1]."""
        decoded: torch.Tensor = self.autoencoder.decode(latents, self.settings.frames)[0].float().clamp(-1, 1)
        return decoded


def run(checkpoint: VideoCheckpoint, plan: Plan, work: pathlib.Path, results: ResultFile) -> None:
    """Measure every method that the results lack."""
    torch.set_num_threads(plan.threads)
    sampler = Sampler(checkpoint)
    wanted = clips.prompts(plan.prompts, SEED)
    references = [
        sampler.clip(reference(sampler, plan, clip.caption(), index, work))
        for index, clip in enumerate(tqdm(wanted, desc="references", disable=None))
    ]
    for method in plan.methods():
        key = {"kind": "method", "method": method.name}
        if results.find(key) is None:
            results.add({**key, **measure(sampler, method, wanted, references)})
    print(*table(results.rows), sep="\n", flush=True)


def reference(sampler: Sampler, plan: Plan, caption: str, index: int, work: pathlib.Path) -> torch.Tensor:
    """The latents of the reference run, from `work` where they are."""
    path = work / f"reference_{plan.checkpoint[:16]}_{plan.reference_steps}_{index}.pt"
    if path.is_file():
        kept: torch.Tensor = torch.load(path, weights_only=True)
        return kept
    latents = sampler.latents(caption, index, Method("reference", plan.reference_steps)).latents.clone()
    unfinished = path.with_suffix(".tmp")
    torch.save(latents, unfinished)
    unfinished.replace(path)
    return latents


def measure(
    sampler: Sampler, method: Method, wanted: list[clips.Clip], references: list[torch.Tensor]
) -> dict[str, Any]:
    """Every measure of every prompt's clip."""
    found: dict[str, list[float]] = {name: [] for name in ("evaluations", "right", *MEASURES)}
    for index, clip in enumerate(tqdm(wanted, desc=method.name, disable=None)):
        sampled = sampler.latents(clip.caption(), index, method)
        video, best = sampler.clip(sampled.latents), references[index]
        found["evaluations"].append(sampled.evaluations)
        found["right"].append(float(clip_detectors.agreement(clip_detectors.detect(video), clip).all))
        found["psnr"].append(video_quality.psnr(video, best))
        found["ssim"].append(video_quality.ssim(video, best))
        found["flicker"].append(video_quality.temporal_flicker(video))
        found["dynamic"].append(video_quality.dynamic_degree(video))
    return found


def table(rows: list[Row]) -> Iterator[str]:
    """One line a method; losses are against plain sampling, and caption agreement has Wilson's interval."""
    plain = next(row for row in rows if row["method"] == PLAIN)
    yield f"{len(plain['psnr'])} prompts"
    for row in rows:
        count = len(row["psnr"])
        mean = {name: sum(row[name]) / count for name in ("evaluations", *MEASURES)}
        agreed = wilson_interval(int(sum(row["right"])), count)
        right, low, high = (100 * share for share in (agreed.estimate, agreed.low, agreed.high))
        line = (
            f"  {row['method']:<38} {mean['evaluations']:5.1f} evaluations, PSNR {mean['psnr']:5.2f} dB, SSIM "
            f"{mean['ssim']:.3f}, right {right:5.1f} % [{low:.1f}, {high:.1f}]"
            f", flicker {mean['flicker']:.2f}, dynamic degree {mean['dynamic']:.2f}"
        )
        if row is not plain:
            loss = paired_difference(plain["psnr"], row["psnr"])
            line += f"; loss {loss.estimate:+.2f} dB [{loss.low:+.2f}, {loss.high:+.2f}]"
        yield line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True, help="a text-to-video folder")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="where references are kept")
    parser.add_argument("--prompts", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=None, help="of the plain run; default: the checkpoint's")
    parser.add_argument("--reference-steps", type=int, default=200, help="default: %(default)s")
    parser.add_argument(
        "--evaluations", type=int, default=19, help="of a fixed leap and of Euler; default: %(default)s"
    )
    parser.add_argument("--merge-steps", type=int, nargs="*", default=[10, 30], help="default: %(default)s")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.05, 0.1], help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "video_quality.json")
    parser.add_argument("--fresh", action="store_true", help="measure every method anew")
    given = parser.parse_args(arguments)
    quiet_libraries()
    try:
        checkpoint = VideoCheckpoint.open(given.checkpoint)
        steps = checkpoint.settings.steps if given.steps is None else given.steps
        counts = (given.prompts, steps, given.reference_steps, given.evaluations, *given.merge_steps)
        if min(counts) < 1 or max(given.evaluations, *given.merge_steps, 0) > steps:
            parser.error(f"counts are at least 1, and evaluations and merged steps at most the {steps} steps")
        if given.reference_steps <= steps:
            parser.error(
                f"the reference has {given.reference_steps} steps; give it more than the {steps} of plain sampling"
            )
        if not all(0.0 < threshold < math.inf for threshold in given.thresholds):
            parser.error(f"thresholds are {given.thresholds}; each must be above 0 and finite")
        plan = Plan(
            checkpoint.sha256(),
            given.prompts,
            steps,
            given.reference_steps,
            given.evaluations,
            tuple(given.merge_steps),
            tuple(given.thresholds),
            given.threads,
        )
        command = " ".join(
            ["python", "bench/workloads/video_quality.py", *(sys.argv[1:] if arguments is None else arguments)]
        )
        results = ResultFile(given.output, command, dataclasses.asdict(plan), fresh=given.fresh)
        given.work.mkdir(parents=True, exist_ok=True)
        run(checkpoint, plan, given.work, results)
    except EdgerunError as error:
        sys.exit(f"error: {error}")
    print(f"\nwrote {given.output}")


if __name__ == "__main__":
    main()
