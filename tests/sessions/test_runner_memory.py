"""The runner's memory limit, enforced from outside; and a run in parts, each a process of its own."""

from __future__ import annotations

import json
import pathlib
import subprocess

import pytest

from bench.memory_box import Boxed, MemoryBox, memory_box
from bench.workloads.full_size_video import smallest_limit_bytes
from edgerun._library import runner_path
from tests.sessions.tiny_video import CAPTION, COLUMNS, FRAMES, ROWS, VIDEO_FRAMES, wide_bundle

LIMIT_BYTES = 70_000_000
BOX_BYTES = LIMIT_BYTES * 11 // 10


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return wide_bundle(tmp_path_factory)


def command(bundle: pathlib.Path, *options: str | pathlib.Path) -> list[str]:
    return [str(one) for one in (runner_path(), bundle, "--tokens", "1,2,3", "--seed", "5", "--threads", "1", *options)]


def free(bundle: pathlib.Path, *options: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(bundle, *options), capture_output=True, text=True, timeout=300)


def boxed(box: MemoryBox, bundle: pathlib.Path, limit_bytes: int | None, out: pathlib.Path) -> Boxed:
    limit = [] if limit_bytes is None else ["--memory-limit", str(limit_bytes)]
    return box.run(command(bundle, *limit, "--latent-out", out))


@pytest.mark.parametrize("cgroups", [True, False])
def test_the_limit_holds_where_the_kernel_enforces_it(
    wide: pathlib.Path, tmp_path: pathlib.Path, cgroups: bool
) -> None:
    """A limit, in a box of 1.1 times that: the bits of a free run. Without a limit, the same run fails there."""
    assert free(wide, "--latent-out", tmp_path / "expected").returncode == 0
    with memory_box(BOX_BYTES, cgroups=cgroups) as box:
        if cgroups and not box.kind.startswith("cgroup"):
            pytest.skip("no memory cgroup can be made here")
        done = boxed(box, wide, LIMIT_BYTES, tmp_path / "latent")
        assert (done.status, done.errors, done.killed) == (0, "", False)
        assert (tmp_path / "latent").read_bytes() == (tmp_path / "expected").read_bytes()
        run = json.loads(done.output)["run"]
        assert run["peak_rss_bytes"] <= LIMIT_BYTES
        unlimited = boxed(box, wide, None, tmp_path / "never")
    assert unlimited.killed == cgroups and unlimited.status != 0
    assert not (tmp_path / "never").exists()


def test_half_the_smallest_limit_fails_in_one_line(wide: pathlib.Path, tmp_path: pathlib.Path) -> None:
    least = smallest_limit_bytes(json.loads(free(wide, "--memory-limit", "1GB").stdout)["run"])
    assert least < LIMIT_BYTES
    with memory_box(least) as box:
        half = boxed(box, wide, least // 2, tmp_path / "half")
    assert (half.status, half.killed, half.errors.count("\n")) == (2, False, 1)
    assert f"of a memory limit of {least // 2} bytes" in half.errors and "denoiser" in half.errors
    assert list(tmp_path.iterdir()) == []
    enough = free(wide, "--memory-limit", str(least * 21 // 20), "--latent-out", tmp_path / "enough")  # it is feasible
    assert enough.returncode == 0, enough.stderr


def test_stages_can_be_processes_of_their_own(wide: pathlib.Path, tmp_path: pathlib.Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert free(wide, "--frames-out", whole, "--latent-out", tmp_path / "latent").returncode == 0
    encoded, denoised = tmp_path / "encoded", tmp_path / "denoised"
    done = free(wide, "--stop-after", "encode", "--state-out", encoded)
    assert (done.returncode, done.stderr) == (0, "")
    stages = json.loads(done.stdout)["run"]["stages"]
    assert stages["encode"] and not stages["decode"] and json.loads(done.stdout)["run"]["steps"] == []
    latent_bytes = 4 * FRAMES * 4 * ROWS * COLUMNS
    assert latent_bytes + 4 * 3 * CAPTION < encoded.stat().st_size < 2 * latent_bytes
    options = ["--state-in", encoded, "--stop-after", "denoise", "--state-out", denoised]
    assert free(wide, *options, "--latent-out", tmp_path / "latent of parts").returncode == 0
    assert (tmp_path / "latent of parts").read_bytes() == (tmp_path / "latent").read_bytes()
    assert free(wide, "--state-in", denoised, "--frames-out", parts).returncode == 0
    assert parts.read_bytes() == whole.read_bytes() and len(parts.read_bytes()) % (3 * VIDEO_FRAMES) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--stop-after", "decode"], "--stop-after is 'decode'; it must be encode or denoise"),
        (["--stop-after", "encode"], "--stop-after needs --state-out"),
        (["--stop-after", "encode", "--state-out", "s", "--latent-out", "l"], "before the latent is made"),
        (["--stop-after", "denoise", "--state-out", "s", "--frames-out", "f"], "before frames are made"),
    ],
)
def test_a_stop_that_cannot_be(wide: pathlib.Path, options: list[str], said: str) -> None:
    done = free(wide, *options)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
