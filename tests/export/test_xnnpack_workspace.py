"""What an exporter states of XNNPACK's memory, against what a process takes when it executes the program."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgerun.export.lower.executorch import LoweredProgram, lower
from edgerun.export.lower.xnnpack_workspace import peak_bytes
from edgerun.models.temporal_vae import VideoAutoencoder, VideoAutoencoderConfig
from edgerun.models.temporal_vae_blocks import decoder_blocks

SLACK_BYTES = 2 << 20  # what Python and the C library's heap take for themselves meanwhile


class FeedForward(nn.Module):
    """[1, n, 256] → the same shape, n open."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.silu(self.up(x)))


class Attention(nn.Module):
    """[4, n, 64] → the same shape: products of two values, and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.bmm(self.query(x), self.key(x).transpose(1, 2)).softmax(-1)
        return torch.bmm(weights, self.value(x))


@dataclasses.dataclass(frozen=True)
class Case:
    """A module, its largest input, and the dimension of it that is open."""

    module: nn.Module
    example: tuple[int, ...]
    opened: int | None = None

    def shapes(self) -> list[tuple[int, ...]]:
        """Of calls: the largest, and the smallest."""
        if self.opened is None:
            return [self.example]
        return [self.example, (*self.example[: self.opened], 1, *self.example[self.opened + 1 :])]


def small_decoder() -> dict[str, nn.Module]:
    """Blocks of one step each."""
    config = VideoAutoencoderConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        temporal_filters=64,
        temporal_multipliers=(1, 1),
        temporal_downsample=(True,),
        temporal_residual_blocks=1,
    )
    torch.manual_seed(0)
    return {one.name: one.module for one in decoder_blocks(VideoAutoencoder(config).eval().requires_grad_(False), 0)}


def cases() -> dict[str, Case]:
    steps = small_decoder()
    stretch = nn.Sequential(steps["time_1"], steps["time_3"], steps["time_4"])  # time doubles between residual blocks
    enlarge = nn.Sequential(steps["frames_5"], steps["frames_6"], steps["frames_7"])  # XNNPACK leaves enlarging out
    return {
        "feed_forward": Case(FeedForward(), (1, 2048, 256), 1),
        "attention": Case(Attention(), (4, 768, 64), 1),
        "time": Case(stretch, (5, 64, 32, 48), 0),
        "two_partitions": Case(enlarge, (1, 64, 64, 96)),
    }


MEASURE = """
import json, sys, threading, numpy as np
from edgerun import _native
found, seen, done = [], [], False
def watch():
    while not done:
        seen.append(_native.resident_bytes()[0])
threading.Thread(target=watch).start()
try:
    for path, shape in json.loads(sys.argv[1]):
        loader = _native.BlockLoader([("block", path, -1, ["x"], ["y"])], 0, 1 << 40)
        loader.set("x", np.random.default_rng(0).standard_normal(shape, np.float32))
        start, first = _native.resident_bytes()[0], len(seen) + 1
        loader.run(True)
        grown = max(seen[first:], default=start) - start
        found.append({"activations": loader.activation_bytes, "grown": grown,
                      "loaded": loader.blocks()[0]["loaded_bytes"], "given": loader.get("y").nbytes})
        del loader
finally:
    done = True
print(json.dumps(found))
"""


def measure(calls: list[tuple[pathlib.Path, tuple[int, ...]]]) -> list[dict[str, int]]:
    """Programs and shapes of their inputs, each in turn alone in a process that does nothing else."""
    arguments = json.dumps([(str(path), shape) for path, shape in calls])
    done = subprocess.run([sys.executable, "-c", MEASURE, arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    measured: list[dict[str, int]] = json.loads(done.stdout)
    return measured


def lowered(case: Case, path: pathlib.Path) -> LoweredProgram:
    module = case.module.eval().requires_grad_(False)
    limit = case.example[case.opened or 0]
    shapes = None if case.opened is None else ({case.opened: torch.export.Dim("open", min=1, max=limit)},)
    return lower(torch.export.export(module, (torch.randn(case.example),), dynamic_shapes=shapes), path, {})


def assert_stated(stated: LoweredProgram, measured: dict[str, int], shape: tuple[int, ...], largest: bool) -> None:
    """An upper bound; of the largest call, none that keeps memory from those who could use it."""
    values = 4 * torch.Size(shape).numel() + measured["given"]
    most = values + stated.planned_bytes + stated.arena_bytes + stated.table_bytes
    assert measured["activations"] <= most + SLACK_BYTES
    assert measured["grown"] <= most + measured["loaded"] + SLACK_BYTES
    assert not largest or measured["activations"] >= 0.8 * most - SLACK_BYTES


def test_what_is_stated_is_what_a_process_takes(tmp_path: pathlib.Path) -> None:
    every = cases()
    stated = {name: lowered(case, tmp_path / f"{name}.pte") for name, case in every.items()}
    assert min(one.arena_bytes for one in stated.values()) > 2 * SLACK_BYTES  # or it would say nothing
    calls = [(name, shape) for name, case in every.items() for shape in case.shapes()]
    measured = measure([(tmp_path / f"{name}.pte", shape) for name, shape in calls])
    for (name, shape), found in zip(calls, measured, strict=True):
        assert_stated(stated[name], found, shape, shape == every[name].example)


@pytest.mark.slow
def test_a_decoder_block_of_official_size(tmp_path: pathlib.Path) -> None:
    """The first residual block of full height and width at 144 x 256, between 256 and 128 channels."""
    from diffusers.models.resnet import ResnetBlock2D

    from edgerun.models.temporal_vae_blocks import FrameNorm, FrameResidual

    source = ResnetBlock2D(in_channels=256, out_channels=128, temb_channels=None, groups=32)
    norms = (FrameNorm(source.norm1, over_time=False), FrameNorm(source.norm2, over_time=False))
    case = Case(FrameResidual(norms, (source.conv1, source.conv2), source.conv_shortcut), (1, 256, 144, 256))
    stated = lowered(case, tmp_path / "block.pte")
    (measured,) = measure([(tmp_path / "block.pte", case.example)])
    assert_stated(stated, measured, case.example, True)
    assert stated.arena_bytes > 100 << 20


def test_an_arena_grows_beside_the_old_one() -> None:
    assert peak_bytes([]) == 0
    assert peak_bytes([10, 30, 20]) == 40
    assert peak_bytes([30, 10]) == 30
    assert peak_bytes([10, 30, 40]) == 70
