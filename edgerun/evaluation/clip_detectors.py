"""Read what a clip shows back from its pixels: background, colour, shape and motion, by rules without learned parts.

The background is the median of each frame's border. What differs from it is the object; its colour is the nearest of
the palette's, its shape the one that looks most like it when drawn at its place, area and angle, and its motion is
read from the tracks of its centroid and its angle. A clip whose object is missing has no attributes, and one that
does not follow any class clearly has None there, so that it counts as wrong.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from edgerun.evaluation import clips
from edgerun.evaluation.clips import Clip

if TYPE_CHECKING:
    import torch

STILL = "still"

_BORDER = 2  # pixels
_BACKGROUND_REACH = 0.30  # farthest from a background of the palette, in sRGB; black and navy are 0.31 apart
_PEAK_PIXELS = 30  # that differ most from the background; the smallest shape has 72 at 48 x 48
_LEAST_CONTRAST = 0.20  # of these pixels, in sRGB; the palette's is at least 0.4
_CORE = 0.8  # of the contrast: pixels that differ more are surely the object's
_GAIN = (0.75, 1.10)  # how much of a colour's difference from the background a lossy clip may keep
_SEEN = 0.8  # least share of the frames in which the object must be found
_CLEAR = 0.6  # least share of the frames that must agree on the colour, or on the shape
_SHAPE_FRAMES = 9
_SCALES = (0.76, 0.84, 0.92, 1.0, 1.08)  # of the radius that the area gives: blur makes it larger, fills holes
_LUMA = (0.299, 0.587, 0.114)  # BT.601
_LUMA_WEIGHT = 8.0  # of the squared error of brightness, which lossy coding keeps sharpest, against each channel's
_BLURS = (0.0, 0.8, 1.4)  # sigma in pixels: what an autoencoder may have done to the templates
_LEAST_LIKENESS = 0.75  # share of the mask's energy that the template explains
_TRAVEL = 0.11  # least travel of a motion, in sides; the least drawn is 0.17
_REVERSAL = 0.06  # least way back that counts as one, in sides
_STRAIGHT = 0.5  # largest travel across, in travels along
_TURN = math.radians(40.0)  # least rotation; the least drawn is 80 degrees


@dataclasses.dataclass(frozen=True)
class Detection:
    """The classes read from a clip, None where none is clear, each with a confidence from 0 to 1.

    motion: one of clips.MOTIONS or STILL. The confidence of background and colour is 1 less the ratio of the distances
    to the nearest class and to the next, that of the shape the share of frames that agree, that of the motion the
    share of the whole way (or rotation) that its class explains.
    """

    background: str | None
    colour: str | None
    shape: str | None
    motion: str | None
    background_confidence: float = 0.0
    colour_confidence: float = 0.0
    shape_confidence: float = 0.0
    motion_confidence: float = 0.0


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Which attributes of a detection are as the caption says. background: None when the caption does not say."""

    colour: bool
    shape: bool
    motion: bool
    background: bool | None

    @property
    def all(self) -> bool:
        """Whether colour, shape and motion are all right."""
        return self.colour and self.shape and self.motion


def agreement(detection: Detection, clip: Clip) -> Agreement:
    """Hold what was detected against what the caption says."""
    return Agreement(
        colour=detection.colour == clip.colour,
        shape=detection.shape == clip.shape,
        motion=detection.motion == clip.motion,
        background=None if clip.background is None else detection.background == clip.background,
    )


def detect(video: torch.Tensor) -> Detection:
    """Read one clip [3, T, H, W]: sRGB, a floating dtype in [-1, 1] or uint8. Deterministic; runs where the clip lies.

    Raises ValueError for another shape, fewer than 2 frames, or values that are not finite.
    """
    import torch

    if video.ndim != 4 or video.shape[0] != 3 or video.shape[1] < 2:
        raise ValueError(f"a clip of shape {list(video.shape)}; give [3, T, H, W] with T of 2 or more")
    pixels = video.float() / 255.0 if video.dtype == torch.uint8 else (video.float() + 1.0) / 2.0
    if not bool(torch.isfinite(pixels).all()):
        raise ValueError("a clip with values that are not finite; decode it again")
    behind = _border_medians(pixels)  # [3, T]
    background, background_confidence = _nearest_background(behind.median(dim=1).values)
    difference = pixels - behind[:, :, None, None]
    amount = difference.square().sum(0).sqrt()  # [T, H, W]
    peak = amount.flatten(1).topk(min(_PEAK_PIXELS, amount[0].numel())).values.mean(1)  # [T]
    contrast = float(peak.median())
    seen = peak >= max(0.5 * contrast, _LEAST_CONTRAST)
    if contrast < _LEAST_CONTRAST or float(seen.float().mean()) < _SEEN:
        return Detection(background, None, None, None, background_confidence)
    difference, amount, behind = difference[:, seen], amount[seen], behind[:, seen]

    core = (amount >= _CORE * contrast).float()
    core_pixels = core.sum((1, 2)).clamp_min(1.0)
    own = (difference * core).sum((2, 3)) / core_pixels  # [3, T]: mean difference from the background
    colour, colour_confidence = _nearest_colour(own, behind)
    opacity = _opacity(difference, own)
    radius, position, opacity = _measure(opacity)
    moments = _turning_moments(opacity, position)
    shape, shape_confidence, likeness = _nearest_shape(opacity, radius, position, moments)
    motion, motion_confidence = _motion(position, moments, shape, video.shape[2], video.shape[3])
    return Detection(
        background,
        colour,
        shape if shape_confidence >= _CLEAR and likeness >= _LEAST_LIKENESS else None,
        motion,
        background_confidence,
        colour_confidence,
        shape_confidence,
        motion_confidence,
    )


def _border_medians(pixels: torch.Tensor) -> torch.Tensor:
    """Median [3, T] of each frame's border, channel by channel."""
    import torch

    sides = (
        pixels[:, :, :_BORDER].flatten(2),
        pixels[:, :, -_BORDER:].flatten(2),
        pixels[:, :, _BORDER:-_BORDER, :_BORDER].flatten(2),
        pixels[:, :, _BORDER:-_BORDER, -_BORDER:].flatten(2),
    )
    return torch.cat(sides, -1).median(dim=-1).values


def _nearest_background(colour: torch.Tensor) -> tuple[str | None, float]:
    """The background nearest to a colour [3]; None when none is near."""
    distances = sorted((math.dist(colour.tolist(), rgb), name) for name, rgb in clips.BACKGROUNDS.items())
    nearest, name = distances[0]
    confidence = 1.0 - nearest / distances[1][0]
    return (name, confidence) if nearest <= _BACKGROUND_REACH else (None, 0.0)


def _nearest_colour(own: torch.Tensor, behind: torch.Tensor) -> tuple[str | None, float]:
    """The palette's colour that most frames are nearest to, given differences and backgrounds [3, T].

    Blur mixes background into small shapes, so a colour may show only a part of its difference from the background.
    """
    import torch

    palette = torch.tensor(list(clips.COLOURS.values()), device=own.device)
    full = palette[:, :, None] - behind  # [C, 3, T]
    gain = (full * own).sum(1) / full.square().sum(1).clamp_min(1e-6)
    distances = (own - gain.clamp(*_GAIN)[:, None] * full).square().sum(1).sqrt()  # [C, T]
    votes = torch.bincount(distances.argmin(0), minlength=len(palette))
    best = int(votes.argmax())
    mean = distances.mean(1)
    rest = float(torch.cat((mean[:best], mean[best + 1 :])).min())
    if float(votes[best]) < _CLEAR * votes.sum():
        return None, 0.0
    return list(clips.COLOURS)[best], max(0.0, 1.0 - float(mean[best]) / rest)


def _opacity(difference: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """How much of each pixel is the object's: [T, H, W] in [0, 1], from differences [3, T, H, W] and the object's."""
    import torch

    luma = torch.tensor(_LUMA, device=own.device)
    weighted = own + _LUMA_WEIGHT * luma[:, None] * (luma[:, None] * own).sum(0)
    share = torch.einsum("cthw,ct->thw", difference, weighted)
    share = share / (weighted * own).sum(0).clamp_min(1e-6)[:, None, None]
    share = share.clamp(0.0, 1.3)
    return share * (share > 0.15)


def _offsets(position: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, 1, W] and y [T, H, 1] of each pixel from positions [T, 2]."""
    import torch

    x = torch.arange(width, device=position.device) + 0.5 - position[:, :1]
    y = torch.arange(height, device=position.device) + 0.5 - position[:, 1:]
    return x[:, None, :], y[:, :, None]


def _measure(opacity: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Radius [T] and centroid [T, 2] of the object, and the opacity [T, H, W] without what lies far from it."""
    import torch

    _, height, width = opacity.shape

    def centroid(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        area = weight.sum((1, 2)).clamp_min(1e-6)
        x = torch.arange(width, device=weight.device) + 0.5
        y = torch.arange(height, device=weight.device) + 0.5
        position = torch.stack(((weight.sum(1) * x).sum(1), (weight.sum(2) * y).sum(1)), -1) / area[:, None]
        return position, (area / math.pi).sqrt()

    position, radius = centroid(opacity * (opacity > 0.5))
    x, y = _offsets(position, height, width)
    near = x.square() + y.square() <= (1.7 * radius + 2.0).square()[:, None, None]
    opacity = opacity * near
    position, radius = centroid(opacity)
    return radius, position, opacity


def _turning_moments(opacity: torch.Tensor, position: torch.Tensor) -> dict[int, torch.Tensor]:
    """For each order n of symmetry, sum of opacity * r^2 * e^(i n angle) [T]: its phase is n times the shape's angle.

    r and angle are a pixel's from the centroid; a shape's corners and arms reach farther than the rest of it.
    """
    import torch

    x, y = (offset.expand_as(opacity) for offset in _offsets(position, opacity.shape[1], opacity.shape[2]))
    unit = torch.complex(-y, x)  # [T, H, W]: 0 upright, clockwise
    square = x.square() + y.square()
    unit = unit / square.sqrt().clamp_min(1e-6)
    weight = opacity * square
    power = unit * unit
    moments = {}
    for order in range(3, 6):
        power = power * unit
        moments[order] = (weight * power).sum((1, 2))
    return moments


def _nearest_shape(
    opacity: torch.Tensor, radius: torch.Tensor, position: torch.Tensor, moments: dict[int, torch.Tensor]
) -> tuple[str, float, float]:
    """The shape that a few frames look like, the share of them that agree, and the median likeness."""
    import torch

    steps = min(_SHAPE_FRAMES, len(radius))
    chosen = torch.linspace(0, len(radius) - 1, steps, device=radius.device).round().long()
    angles = torch.stack(
        [
            moments[order][chosen].angle() / order if order else torch.zeros(steps, device=radius.device)
            for order in clips.SYMMETRY.values()
        ]
    )  # [S, N]
    side = 2 * math.ceil(float(radius[chosen].max()) * 1.7 + 2.0)  # a window holds the object
    corner = (position[chosen] - side / 2).round()
    windows = _windows(opacity[chosen], corner.long(), side)  # [N, side, side]
    scales = torch.tensor(_SCALES, device=radius.device)
    templates = clips.coverage(
        torch.arange(len(clips.SHAPES), device=radius.device)[:, None, None],
        radius[chosen][:, None] * scales,
        (position[chosen] - corner)[:, None],
        angles[:, :, None],
        side,
        side,
    )  # [S, N, scales, side, side]
    likeness = torch.stack([_likeness(windows, _blur(templates, sigma)) for sigma in _BLURS]).amax(0)  # [S, N]
    votes = torch.bincount(likeness.argmax(0), minlength=len(clips.SHAPES))
    best = int(likeness.mean(1).argmax())
    return clips.SHAPES[best], float(votes[best]) / steps, float(likeness[best].median())


def _blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Images [..., H, W] under a Gaussian of `sigma` pixels."""
    import torch

    if sigma == 0.0:
        return images
    height, width = images.shape[-2:]
    steps = torch.arange(max(height, width), device=images.device)
    kernel = torch.exp((steps - steps[:, None]).square() / (-2.0 * sigma**2)) / (sigma * math.sqrt(math.tau))
    return kernel[:height, :height] @ images @ kernel[:width, :width]


def _likeness(windows: torch.Tensor, templates: torch.Tensor) -> torch.Tensor:
    """Squared cosine [S, N] between windows [N, H, W] and the best of their templates [S, N, K, H, W]."""
    product = (templates * windows[:, None]).sum((-1, -2)).square()
    return (
        product / (templates.square().sum((-1, -2)) * windows.square().sum((-1, -2))[:, None]).clamp_min(1e-6)
    ).amax(-1)


def _windows(images: torch.Tensor, corner: torch.Tensor, side: int) -> torch.Tensor:
    """Cut [N, side, side] out of images [N, H, W] at corners (x, y) [N, 2], which may lie outside; 0 there."""
    import torch

    count, height, width = images.shape
    steps = torch.arange(side, device=images.device)
    x, y = corner[:, :1] + steps, corner[:, 1:] + steps  # [N, side]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    index = torch.arange(count, device=images.device)[:, None, None]
    return images[index, y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]] * inside


def _motion(
    position: torch.Tensor, moments: dict[int, torch.Tensor], shape: str, height: int, width: int
) -> tuple[str | None, float]:
    """The motion of a track [T, 2] and of the shape's angle, as a class of clips.MOTIONS or STILL."""
    import torch

    track = _smooth(position) / torch.tensor([width, height], device=position.device)
    travel = track.amax(0) - track.amin(0)
    axis = int(travel.argmax())
    along, across = float(travel[axis]), float(travel[1 - axis])
    if along < _TRAVEL:
        order = clips.SYMMETRY[shape]
        if order:
            steps = moments[order].angle().diff() / order
            period = math.tau / order
            steps = torch.remainder(steps + period / 2, period) - period / 2
            rotation = float(steps.sum())
            if abs(rotation) >= _TURN:
                return (
                    f"turns {'clockwise' if rotation > 0 else 'counterclockwise'}",
                    abs(rotation) / max(float(steps.abs().sum()), 1e-6),
                )
        return STILL, 1.0 - along / _TRAVEL
    if across > _STRAIGHT * along:
        return None, 0.0
    line = track[:, axis].tolist()
    confidence = 1.0 - across / along
    if _reversals(line) > 0:
        return ("bounces left and right", "bounces up and down")[axis], confidence
    names = (("moves left", "moves right"), ("moves up", "moves down"))
    return names[axis][line[-1] > line[0]], confidence


def _smooth(track: torch.Tensor) -> torch.Tensor:
    """Mean [T, 2] of each three points that follow one another; the ends stay."""
    import torch

    middle = (track[:-2] + track[1:-1] + track[2:]) / 3.0
    return torch.cat((track[:1], middle, track[-1:]))


def _reversals(line: list[float]) -> int:
    """How often a coordinate turns back by at least _REVERSAL."""
    count, heading, extreme = 0, 0, line[0]
    for value in line:
        if heading == 0 and abs(value - extreme) >= _REVERSAL:
            heading, extreme = (1 if value > extreme else -1), value
        elif (value - extreme) * heading > 0:
            extreme = value
        elif (extreme - value) * heading >= _REVERSAL:
            count, heading, extreme = count + 1, -heading, value
    return count
