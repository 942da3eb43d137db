"""A tiny video checkpoint and its bundle, made once for a test run by the first worker that wants them."""

from __future__ import annotations

import fcntl
import pathlib

import pytest

from edgerun.bundle import Bundle
from edgerun.export import export_video_bundle
from edgerun.video_recipe import VideoRecipe
from tests.models import tiny_video_checkpoint

# Twelve frames are two chunks of five, of three latents each, and two frames of one latent; likewise three calls.
RECIPE = VideoRecipe(frames=12, frames_per_call=5, merge_steps=2, leap="fixed", leap_evaluations=3)


def _folder(factory: pytest.TempPathFactory) -> pathlib.Path:
    base = factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "shared video"
    folder.mkdir(exist_ok=True)
    return folder


def checkpoint(factory: pytest.TempPathFactory) -> pathlib.Path:
    """The checkpoint's folder."""
    folder = _folder(factory)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "a model").is_dir():
            tiny_video_checkpoint.write(folder / "partial", depth=1).rename(folder / "a model")
    return folder / "a model"


def bundle(factory: pytest.TempPathFactory) -> Bundle:
    """Its bundle by RECIPE."""
    source = checkpoint(factory)
    with (source.parent / "bundle lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return export_video_bundle(source, RECIPE, source.parent / "tiny.edgerun")
