"""What `edgerun validate` does for a video bundle."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from edgerun import compare
from edgerun.commands.common import Clock, begin_report, describe_facts, stage_bar
from edgerun.report import Cell, Check, Column, Report, Table

_COLUMNS = (
    Column("case"),
    Column("prompt", "tokens"),
    Column("steps"),
    Column("of them merged"),
    Column("latents", "relative L2"),
    Column("frames"),
    Column("largest difference", "levels"),
    Column("pixels that differ", "%", 3),
    Column("PSNR", "dB", 1),
)


def validate_video_bundle(
    path: pathlib.Path,
    device_name: str = "host",
    *,
    threads: int | None = None,
    memory_limit_bytes: int | None = None,
    command: str = "",
) -> Report:
    """Run a video bundle's golden case on a device and gate its latents and frames.

    Raises BundleError for a damaged bundle or one without a golden case, DeviceError when the device cannot run it.
    """
    from edgerun.bundle import Bundle
    from edgerun.devices import VideoRunRequest, open_device
    from edgerun.sessions.video import Leap
    from edgerun.video_golden import golden_of

    bundle, clock = Bundle.open(path, kind="video"), Clock()
    case = golden_of(bundle)
    device = open_device(device_name)
    with stage_bar("validate") as progress, clock.step(f"clip on {device.name}"):
        request = VideoRunRequest(
            tokens=tuple(case.tokens.tolist()),
            noise=case.noise,
            times=tuple(case.times.tolist()),
            solver=case.solver,
            leap=Leap("none"),
            merge_steps=case.merge_steps,
            memory_limit_bytes=memory_limit_bytes,
            threads=threads,
            on_progress=lambda told: progress(f"clip on {device.name}", told.fraction),
        )
        clip = device.run(path, request).clip
    frames = clip.frames[: len(case.frames)]
    latents_off = compare.relative_l2(clip.latents, case.latents)
    levels_off = compare.max_abs(frames, case.frames)
    row: tuple[Cell, ...] = (
        "clip",
        len(case.tokens),
        len(case.times),
        case.merge_steps,
        latents_off,
        len(case.frames),
        levels_off,
        100.0 * float(np.mean(frames != case.frames)),
        compare.psnr_db(frames, case.frames, 255.0) if levels_off else None,
    )
    report = begin_report("validate", f"edgerun validate: {path} on {device.name}", command)
    worst = max(bundle.manifest["parity"].items(), key=lambda item: float(item[1]))
    facts = (
        ("build", bundle.build),
        ("device", describe_facts(device.describe())),
        ("at export", f"every program held against its module: relative L2 at most {worst[1]:.2g} ({worst[0]})"),
    )
    return dataclasses.replace(
        report,
        facts=facts,
        tables=(Table("Golden case", _COLUMNS, (row,), _note(bundle.manifest, len(case.frames))),),
        checks=_checks(bundle.manifest, latents_off, frames, case.frames),
        steps=tuple(clock.steps),
    )


def _checks(
    manifest: dict[str, Any], latents_off: float, frames: np.ndarray, expected: np.ndarray
) -> tuple[Check, ...]:
    if manifest["recipe"].get("quantize", "none") != "none":
        names = ("quantized_parity_logits", "quantized_frames_psnr_db")
        frames_off = compare.psnr_db(frames, expected, 255.0)
    else:
        names = ("logits_fp32", "pixel_levels")
        frames_off = compare.max_abs(frames, expected)
    found = []
    for what, value, limit in zip(("latents", "frames"), (latents_off, frames_off), names, strict=True):
        row = compare.TOLERANCES[limit]
        measured = None if math.isinf(value) else value  # PSNR of frames without a difference
        name = f"{what}: {row.measure.partition(',')[0]}"
        found.append(Check(name, measured, row.value, row.least, row.allows(value)))
    return tuple(found)


def _note(manifest: dict[str, Any], frames: int) -> str:
    whole = int(manifest["video"]["frames"])
    compared = "all frames" if frames == whole else f"the first {frames} of {whole} frames"
    return f"Against the model's own modules in torch; {compared} compared."
