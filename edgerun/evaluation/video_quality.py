"""How good a generated clip is: nearness to a reference (PSNR, SSIM), flicker between frames, and how much moves.

Every measure takes clips [3, T, H, W], sRGB, of a floating dtype in [-1, 1], as decoders make them; values outside are
clipped, as they are when shown. Nearness says nothing of right or wrong, and a clip that stands still never flickers:
read flicker and dynamic degree together, and beside the caption agreement of clip_detectors.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgerun.errors import EdgerunError

if TYPE_CHECKING:
    import torch

_FASTEST_SHARE = 0.05  # of a frame's pixels: VBench takes the mean of the largest 5 % of the flow
_FLOW_SIGMA = 1.0  # pixels
_FLOW_TIGHTNESS = 0.1  # 0.3 by default, at which noise moves the flow more
_SSIM_SIGMA = 1.5  # pixels


def psnr(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB: 10 log10(2^2 / mean squared error over the whole clip); inf when equal.

    Raises ValueError for another shape, or for shapes that differ.
    """
    shown, wanted = _same_shape(video, reference)
    error = float((shown.double() - wanted.double()).square().mean())
    return math.inf if error == 0.0 else 10.0 * math.log10(4.0 / error)


def ssim(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over frames and channels of the structural similarity, -1 to 1 (Wang et al. 2004, equation 13).

    With their Gaussian window of 1.5 pixels and constants, and population variances; scikit-image computes it.
    Raises ValueError for another shape, shapes that differ, or sides under 11 pixels, which the window needs;
    EdgerunError without scikit-image.
    """
    metrics = _scikit_image("metrics")
    shown, wanted = _same_shape(video, reference)
    if min(shown.shape[2:]) < 11:
        raise ValueError(f"frames of {shown.shape[2]} x {shown.shape[3]} pixels; SSIM needs 11 x 11 or more")
    # In [0, 1]: the luminance term takes the product of two means, which must not be negative.
    frames = zip(*(((clip.double() + 1.0) / 2.0).permute(1, 2, 3, 0).numpy() for clip in (shown, wanted)), strict=True)
    found = [
        float(
            metrics.structural_similarity(
                a,
                b,
                channel_axis=-1,
                data_range=1.0,
                gaussian_weights=True,
                sigma=_SSIM_SIGMA,
                use_sample_covariance=False,
            )
        )
        for a, b in frames
    ]
    return math.fsum(found) / len(found)


def temporal_flicker(video: torch.Tensor) -> float:
    """Mean absolute difference between consecutive frames, in levels of 8 bits (0 to 255); 0 for a still clip.

    VBench's temporal flickering (arXiv 2311.17982, section 3.1) is (255 - this) / 255. Motion counts too, so compare
    clips of the same prompts and noise. Raises ValueError for another shape or a single frame.
    """
    shown = _checked(video, frames=2)
    return float(shown.diff(dim=1).abs().double().mean()) * 255.0 / 2.0


def dynamic_degree(video: torch.Tensor, *, pairs: int = 16) -> float:
    """How fast the fastest 5 % of the pixels move, in pixels a frame: the mean over `pairs` pairs of frames.

    The pairs are of consecutive frames and evenly spread over the clip. VBench (arXiv 2311.17982, section 3.1) takes
    that mean of RAFT's flow and asks whether it passes a threshold; ours: the value itself, of TV-L1 optical flow
    (Zach et al. 2007, scikit-image) on the direction of colour that varies most in the clip, so that colours of equal
    brightness count, after a Gaussian of 1 pixel, so that noise does not. The fastest pixels are also those of the
    largest errors: what moves by 1 pixel a frame reads as 1.0 to 1.3. The flow is smooth by preference: of a shape that
    turns it sees less than half of the corners' speed. White noise of 0.05 alone reads as 0.06. About 25 ms a pair of
    48 x 48 pixels.
    Raises ValueError for another shape, a single frame or no pairs; EdgerunError without scikit-image.
    """
    import numpy as np
    import torch

    filters, registration = _scikit_image("filters"), _scikit_image("registration")
    shown = _checked(video, frames=2)
    if pairs < 1:
        raise ValueError(f"{pairs} pairs of frames; measure at least 1")
    centred = (shown - shown.mean((1, 2, 3), keepdim=True)).flatten(1).double() / 2.0
    axis = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -1]
    planes = (axis @ centred).view(shown.shape[1:]).float().numpy()  # [T, H, W]
    smooth = filters.gaussian(planes, sigma=(0.0, _FLOW_SIGMA, _FLOW_SIGMA), preserve_range=True)
    firsts = np.unique(np.linspace(0, len(planes) - 2, pairs).round().astype(int))
    speeds = []
    for first in firsts:
        before, after = smooth[first], smooth[first + 1]
        if np.array_equal(before, after):
            speeds.append(0.0)
            continue
        flow = registration.optical_flow_tvl1(before, after, tightness=_FLOW_TIGHTNESS, dtype=np.float32)
        magnitudes = np.sort(np.hypot(*flow), axis=None)
        speeds.append(float(magnitudes[-max(1, int(_FASTEST_SHARE * magnitudes.size)) :].mean()))
    return math.fsum(speeds) / len(speeds)


def _checked(video: torch.Tensor, frames: int = 1) -> torch.Tensor:
    """The clip on the CPU, float32, clipped to [-1, 1]."""
    import torch

    if video.ndim != 4 or video.shape[0] != 3 or video.shape[1] < frames or not video.is_floating_point():
        raise ValueError(
            f"a clip of shape {list(video.shape)} and {video.dtype}; "
            f"give [3, T, H, W] in [-1, 1] with T of {frames} or more"
        )
    if not bool(torch.isfinite(video).all()):
        raise ValueError("a clip with values that are not finite; decode it again")
    return video.detach().cpu().float().clamp(-1.0, 1.0)


def _same_shape(video: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if video.shape != reference.shape:
        raise ValueError(f"a clip of shape {list(video.shape)} and a reference of {list(reference.shape)}; cut to one")
    return _checked(video), _checked(reference)


def _scikit_image(name: str) -> Any:
    """A module of scikit-image, which only these measures need."""
    import importlib

    try:
        return importlib.import_module(f"skimage.{name}")
    except ImportError as error:
        raise EdgerunError(f"the measure needs scikit-image ({error}); pip install scikit-image") from error
