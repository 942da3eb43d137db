"""One small bundle, exported once for all tests and workers that run it (about 20 s of one core)."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from edgerun.bundle import MANIFEST
from edgerun.recipe import DhsaOptions, Recipe
from tests.models.tiny_checkpoints import save_tiny_checkpoint

BUDGET = 112  # tokens; prompts beyond it are attended sparsely
RECIPE = Recipe(max_context=256, prefill_slice=64, dhsa=DhsaOptions(budget=BUDGET, tile=16))


@dataclasses.dataclass(frozen=True)
class SharedBundle:
    checkpoint: pathlib.Path
    path: pathlib.Path


def shared_bundle(factory: pytest.TempPathFactory, name: str, recipe: Recipe, **changes: Any) -> SharedBundle:
    """The bundle of that name for this test run: a tiny Llama 3 with `changes` to its configuration."""
    from edgerun.export import export_bundle

    base = factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / f"shared-{name}"
    folder.mkdir(exist_ok=True)
    found = SharedBundle(folder / "checkpoint", folder / "model.edgerun")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.path.is_dir():
            shutil.rmtree(found.checkpoint, ignore_errors=True)
            export_bundle(save_tiny_checkpoint(found.checkpoint, "llama3", **changes), recipe, found.path)
    return found


def changed_bundle(
    source: pathlib.Path, target: pathlib.Path, change: Callable[[dict[str, Any]], None]
) -> pathlib.Path:
    """A copy of a bundle with another manifest."""
    shutil.copytree(source, target)
    manifest = json.loads((target / MANIFEST).read_text())
    change(manifest)
    (target / MANIFEST).write_text(json.dumps(manifest))
    return target


def replace_program(bundle: pathlib.Path, content: bytes) -> None:
    """Give a bundle another program, with a manifest that agrees."""
    (bundle / "programs/text.pte").write_bytes(content)
    manifest = json.loads((bundle / MANIFEST).read_text())
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"]["programs/text.pte"] = facts
    (bundle / MANIFEST).write_text(json.dumps(manifest))
