"""Train the video zoo model on generated clips: the autoencoder of frames, the one over time, the text encoder on what
captions mean, then with it, as it is, the denoiser on latents.

Clips and captions come from edgerun.evaluation.clips, drawn and rendered on the training device; combinations of
colour, shape and motion that are held out are never trained on. The denoiser learns Open-Sora's rectified flow: times
logit-normal, shifted as they are when sampling, one caption in ten replaced by the null caption.

Each stage runs for a given time: warm-up, constant, then the learning rate falls to zero over the last part. A CUDA
device needs minutes a stage, two CPU cores hours; SIGTERM saves, and the same command goes on.

    python bench/train_zoo_video.py frames --out RUN --minutes 30
    python bench/train_zoo_video.py time --out RUN --minutes 30
    python bench/train_zoo_video.py decoder --out RUN --minutes 15     # latents stay: at any time after
    python bench/train_zoo_video.py text --out RUN --minutes 3
    python bench/train_zoo_video.py denoiser --out RUN --minutes 240
    python bench/train_zoo_video.py check --out RUN --to check.json # 200 prompts, read back from the pixels
    python bench/train_zoo_video.py export --out RUN --to edgerun/zoo/video
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from bench.zoo_video_autoencoder import load_vae, train_decoder, train_frames, train_time
from bench.zoo_video_common import FPS, FRAMES, GUIDANCE, SAMPLING_BASE, SIDE, STEPS, mixed
from bench.zoo_video_denoiser import Words, generate, load_networks, train_denoiser, train_text
from edgerun.commands.common import begin_report
from edgerun.evaluation import clips
from edgerun.evaluation.statistics import wilson_interval
from edgerun.models.solvers import SOLVERS, Solver
from edgerun.report import Cell, Column, Estimate, Table, write_json

ATTRIBUTES = ("colour", "shape", "motion", "all")
_COLUMNS = (Column("clips"), *(Column(name, "%", 1) for name in ATTRIBUTES))


def score(name: str, videos: Callable[[list[clips.Clip]], torch.Tensor], wanted: list[clips.Clip]) -> tuple[Cell, ...]:
    """How many of the clips the detectors read as wanted, with Wilson's 95 % intervals."""
    from edgerun.evaluation import clip_detectors

    right = dict.fromkeys(ATTRIBUTES, 0)
    for first in range(0, len(wanted), 50):
        part = wanted[first : first + 50]
        for clip, video in zip(part, videos(part, 41 + first).cpu(), strict=True):
            agreed = clip_detectors.agreement(clip_detectors.detect(video), clip)
            for key in right:
                right[key] += getattr(agreed, key)
    print(json.dumps({"clips": len(wanted), "what": name, **right}), flush=True)
    found = [wilson_interval(number, len(wanted)) for number in right.values()]
    shares = [Estimate(100 * one.estimate, 100 * one.low, 100 * one.high, n=len(wanted)) for one in found]
    return (name, *shares)


def check(
    out: pathlib.Path,
    count: int,
    device: str,
    guidance: float,
    steps: int,
    solver: Solver,
    to: pathlib.Path | None,
) -> None:
    """Detectors on real clips, on what the autoencoder makes of them, and on what the model makes of captions."""
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
    words, vae = Words(), load_vae(out / "vae", device)
    wanted = clips.prompts(count, 40)

    def real(part: list[clips.Clip], seed: int) -> torch.Tensor:
        return clips.render(clips.enact(part, torch.Generator(device).manual_seed(seed), device))

    def rebuilt(part: list[clips.Clip], seed: int) -> torch.Tensor:
        with torch.no_grad(), mixed(device):
            return vae.decode(vae.encode(real(part, seed), sample=False), FRAMES).float()

    rows = [score("drawn", real, wanted), score("through the autoencoder", rebuilt, wanted)]
    if (out / "denoiser").exists():
        networks = load_networks(out, words, device)

        def made(part: list[clips.Clip], seed: int) -> torch.Tensor:
            captions = [clip.caption() for clip in part]
            return generate(networks, vae, words, captions, device, seed, steps, guidance, solver)

        for split in ("seen", "held_out"):
            chosen = clips.prompts(count, 42, split)  # type: ignore[arg-type]
            rows.append(score(f"generated, combinations {split.replace('_', ' ')}", made, chosen))
    note = f"{count} clips each; generated in {steps} steps of {solver}, guidance {guidance:g}, bfloat16 products."
    if to is not None:
        table = Table("As the caption says, read back from the pixels", _COLUMNS, tuple(rows), note)
        command = f"{pathlib.Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}"
        report = begin_report("eval", "The video zoo model", f"python bench/{command}")
        write_json(dataclasses.replace(report, tables=(table,)), to)


@torch.no_grad()
def show(out: pathlib.Path, device: str, path: pathlib.Path, guidance: float) -> None:
    """A sheet of clips as an image: six frames each of real, rebuilt and generated."""
    from PIL import Image

    words, vae = Words(), load_vae(out / "vae", device)
    wanted = clips.prompts(8, 44)
    real = clips.render(clips.enact(wanted, torch.Generator(device).manual_seed(45), device))
    rows = [real, vae.decode(vae.encode(real, sample=False), FRAMES).clamp(-1, 1)]
    if (out / "denoiser").exists():
        networks = load_networks(out, words, device)
        rows.append(generate(networks, vae, words, [c.caption() for c in wanted], device, 46, guidance=guidance))
    picked = torch.stack(rows, 1)[:, :, :, ::10]  # [clip, kind, 3, 6, H, W]
    sheet = picked.permute(0, 4, 1, 3, 5, 2).float().cpu()  # [clip, H, kind, 6, W, 3]
    sheet = sheet.reshape(len(wanted) * SIDE, -1, 3)
    Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy()).save(path)
    for clip in wanted:
        print(clip.caption())


def export(out: pathlib.Path, to: pathlib.Path) -> None:
    """The folder that ships."""
    for part in ("vae", "denoiser", "text_encoder"):
        (to / part).mkdir(parents=True, exist_ok=True)
        for file in (out / part).iterdir():
            (to / part / file.name).write_bytes(file.read_bytes())
    settings = {
        "frames": FRAMES,
        "height": SIDE,
        "width": SIDE,
        "fps": FPS,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "schedule_base": SAMPLING_BASE,
    }
    (to / "video.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(f"{sum(f.stat().st_size for f in to.rglob('*') if f.is_file()) / 1e6:.1f} MB in {to}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["frames", "time", "decoder", "text", "denoiser", "check", "show", "export"])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--batch", type=int, help="clips a step; of text, captions")
    parser.add_argument("--clips", type=int, default=32_000, help="clips in the cache of latents")
    parser.add_argument("--peak", type=float, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=0.5, help="share of the time over which the rate falls to zero")
    parser.add_argument(
        "--still", type=float, default=0.0, help="share of the time, first, that trains on single frames"
    )
    parser.add_argument(
        "--one-way", type=float, default=0.0, help="share of the time, first, without half of the directions of motion"
    )
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon", help="of the denoiser")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="compile the denoiser's blocks: a minute, then faster")
    parser.add_argument("--count", type=int, default=200, help="prompts to check")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--solver", choices=SOLVERS, default="euler")
    parser.add_argument("--to", type=pathlib.Path, help="export: folder; check: report; show: image to write")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if given.stage == "frames":
        train_frames(given.out, given.minutes, given.batch or 16, given.peak or 5e-4, given.device)
    elif given.stage == "time":
        train_time(given.out, given.minutes, given.batch or 8, given.peak or 5e-4, given.device)
    elif given.stage == "decoder":
        train_decoder(given.out, given.minutes, given.batch or 8, given.peak or 5e-4, given.device)
    elif given.stage == "text":
        train_text(given.out, given.minutes, given.batch or 256, given.peak or 1e-3, given.decay, given.device)
    elif given.stage == "denoiser":
        train_denoiser(
            given.out,
            given.minutes,
            given.batch or 256,
            given.clips,
            given.peak or 5e-4,
            given.decay,
            given.device,
            given.compile,
            given.still,
            given.one_way,
            given.optimizer == "muon",
        )
    elif given.stage == "check":
        check(given.out, given.count, given.device, given.guidance, given.steps, given.solver, given.to)
    elif given.stage == "show":
        show(given.out, given.device, given.to or given.out / "sheet.png", given.guidance)
    else:
        export(given.out, given.to or pathlib.Path("edgerun/zoo/video"))


if __name__ == "__main__":
    main()
