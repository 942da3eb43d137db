"""The golden case of a video bundle: a prompt's way through all four chains, kept while the chains are exported.

An export runs every block's module once, to hold the block's program against it. Here that pass is given a run's own
values: the prompt's features go on to the denoiser, its guided velocity makes a step, and what is denoised is what the
decoder runs on. So the case costs nothing but a second step, which a model has that needs little work for one: without
merging, after a first one with it where the bundle merges. It keeps the frames that the decoder's first call gives, as
many as 4 MiB hold. One block is in memory at a time.
"""

from __future__ import annotations

import numpy as np
import torch

from edgerun.bundle import BundleWriter
from edgerun.export.video_blocks import Geometry, denoiser_chain, merge_of
from edgerun.export.video_chain import run_chain
from edgerun.models.rectified_flow import advance, guide
from edgerun.models.stdit import rotary_angles
from edgerun.models.text_to_video import VideoCheckpoint
from edgerun.techniques.temporal_token_merging import frame_merge
from edgerun.video_golden import VideoGolden
from edgerun.video_recipe import VideoRecipe

FILE = "golden/clip.safetensors"
_MOST_WORK = 1e12  # multiply-adds of a second step: some ten seconds of a workstation
_MOST_FRAME_BYTES = 1 << 22


class GoldenPass:
    """Goes along with an export: `begin` before the blocks of a chain are run, `end` after."""

    def __init__(self, source: VideoCheckpoint, geometry: Geometry, recipe: VideoRecipe) -> None:
        self._source, self._geometry, self._recipe = source, geometry, recipe
        generator = torch.Generator().manual_seed(0)
        self._noise = torch.randn(source.denoiser.in_channels, *geometry.latent, generator=generator)
        self._latents = self._noise  # [C, T, h, w]
        steps = geometry.times
        second = len(steps) > 1 and _work(source, geometry) <= _MOST_WORK
        self._times = [steps[0], steps[len(steps) // 2]] if second else steps[:1]
        self._merge_steps = self._done = 0
        self._before: tuple[float, torch.Tensor] | None = None
        self._tokens, self._y = torch.empty(0), torch.empty(0)
        self._chunk, self._frames = torch.empty(0), torch.empty(0)

    def begin(self, chain: str, values: dict[str, torch.Tensor]) -> None:
        """Put the run's values in the place of the chain's examples, whose shapes they have."""
        if chain == "denoiser":
            merge = merge_of(self._geometry, self._recipe)
            self._merge_steps = int(merge is not None and torch.equal(values["merge"], merge.merge))
            values |= {"y": self._y, **self._step()}
        elif chain == "time_decoder":
            values["z"] = self._latents[None, :, : values["z"].shape[2]].contiguous()
        elif chain == "frame_decoder":
            count = min(self._geometry.frames, self._source.autoencoder.frames_per_chunk)  # the last of a chunk
            values["pictures"] = self._chunk[-count:][: len(values["pictures"])].contiguous()

    def end(self, chain: str, values: dict[str, torch.Tensor]) -> None:
        """Take what the chain gave."""
        if chain == "text_encoder":
            self._tokens, self._y = values["tokens"], values["y"]
        elif chain == "time_decoder":
            self._chunk = values["chunk"]
        elif chain == "frame_decoder":
            self._frames = values["frames"]
        else:
            self._advance(values["v"])
            if self._done < len(self._times):
                self._advance(self._velocity(values | self._step()))

    def save(self, writer: BundleWriter) -> list[dict[str, str]]:
        """Write the case and return the manifest's "golden"."""
        levels = ((self._frames + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)
        frames = levels[:, : max(1, _MOST_FRAME_BYTES // levels[:, 0].numel())].permute(1, 2, 3, 0)
        writer.subfolder("golden")
        VideoGolden(
            tokens=self._tokens[0].numpy(),
            noise=self._noise.numpy(),
            times=np.array(self._times),
            merge_steps=self._merge_steps,
            solver=self._recipe.solver,
            latents=self._latents.numpy(),
            frames=frames.numpy(),
        ).save(writer.folder / FILE)
        return [{"file": FILE}]

    def _step(self) -> dict[str, torch.Tensor]:
        """Latent and time of the step to be made, once for each half of guidance."""
        return {"x": self._latents.repeat(2, 1, 1, 1, 1), "time": torch.tensor([self._times[self._done]] * 2)}

    def _advance(self, v: torch.Tensor) -> None:
        """v [2, C, T, h, w]: one step, the last one to 0."""
        time, following = [*self._times, 0.0][self._done : self._done + 2]
        velocity = guide(v[0], v[1], self._geometry.guidance)
        self._latents = advance(self._latents, velocity, time, following, self._before)
        self._before = (time, velocity) if self._recipe.solver == "ab2" else None
        self._done += 1

    def _velocity(self, values: dict[str, torch.Tensor]) -> torch.Tensor:
        """The denoiser's, without merging."""
        model, weights = self._source.outline_denoiser()
        blocks, _ = denoiser_chain(model, weights, self._geometry, self._recipe)
        if "merge" in values:
            plain = frame_merge([[frame] for frame in range(self._geometry.latent[0])])
            cosines, sines = rotary_angles(plain.positions, weights["rope.freqs"].float())
            values |= {"merge": plain.merge, "unmerge": plain.unmerge, "cosines": cosines, "sines": sines}
        run_chain(blocks, values, quantize=self._recipe.quantize != "none")
        return values["v"]


def _work(source: VideoCheckpoint, geometry: Geometry) -> float:
    """Multiply-adds of a guided step: every token meets every weight once."""
    (frames, height, width), (rows, columns) = geometry.latent, source.denoiser.patch_size
    weights = sum(tensor.numel() for tensor in source.outline_denoiser()[0].parameters())
    return float(2 * frames * -(-height // rows) * -(-width // columns) * weights)
