"""Generated clips with captions: one coloured shape that moves, bounces or turns on a plain background.

`sample_batch` draws clips and `render` draws their pixels as tensors on any device, fast enough to feed a trainer;
`describe` and `captions` say in English what a batch shows. `sample_clips` and `prompts` give captions first, and
`enact` the clips that they ask for. A caption always has colour, shape and motion, and may have size, speed and
background: what it leaves out was drawn at random, so that it is honest but partial.

Coordinates are in pixels, x to the right and y down, with (0, 0) the frame's top left corner, so that the centre of
pixel (row, column) is (column + 0.5, row + 0.5). Angles are in radians, clockwise on the screen, 0 upright.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

FRAMES = 51
SIDE = 48  # pixels

# sRGB in [0, 1]. Colours are at least 0.4 apart, and no background is nearer than that to a colour drawn on it.
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.50, 0.00),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.10, 0.70, 0.20),
    "cyan": (0.10, 0.85, 0.95),
    "blue": (0.10, 0.25, 0.95),
    "purple": (0.60, 0.15, 0.75),
    "white": (1.00, 1.00, 1.00),
}
BACKGROUNDS = {
    "black": (0.00, 0.00, 0.00),
    "white": (1.00, 1.00, 1.00),
    "grey": (0.40, 0.40, 0.40),
    "navy": (0.05, 0.07, 0.30),
}
SHAPES = ("circle", "ring", "square", "triangle", "star", "cross")
SYMMETRY = {"circle": 0, "ring": 0, "square": 4, "triangle": 3, "star": 5, "cross": 4}  # turns that look alike; 0: all
MOTIONS = (
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "bounces left and right",
    "bounces up and down",
    "turns clockwise",
    "turns counterclockwise",
)
SIZES = ("small", "large")
SPEEDS = ("slowly", "quickly")

# Ranges of what is drawn, row by row for SIZES or SPEEDS.
_RADIUS = ((0.100, 0.120), (0.145, 0.170))  # of a disc of the shape's area, in shorter sides of the frame
_DISTANCE = ((0.17, 0.25), (0.36, 0.60))  # moves: in sides of the frame, over the clip; cut where the way ends
_BEFORE_WALL = (0.40, 0.70)  # bounces: way to the first wall, in ways from wall to wall
_AFTER_WALL = ((0.45, 0.90), (1.25, 1.60))  # bounces: way after it; quickly turns back twice
_ROTATION = ((80.0, 120.0), (150.0, 210.0))  # turns: degrees over the clip; a star looks the same after 72
_TILT = 10.0  # degrees to either side, of a shape that does not turn
_MARGIN = 1.0  # pixels between shape and edge of the frame

_MINIMUM_SIDE = 32  # below it the margin leaves the shortest quick way no room
_MINIMUM_FRAMES = 12  # below it a star can turn by half its symmetry between two frames

Split = Literal["all", "seen", "held_out"]


@dataclasses.dataclass(frozen=True)
class Clip:
    """What a caption asks for. None: the caption does not say. template: which of TEMPLATES words it."""

    colour: str
    shape: str
    motion: str
    background: str | None = None
    size: str | None = None
    speed: str | None = None
    template: int = 0

    def caption(self) -> str:
        """Lower-case words with a blank between two, without punctuation; all are in `caption_words()`."""
        size = f"{self.size} " if self.size else ""
        speed = f" {self.speed}" if self.speed else ""
        place = f"on a {self.background} background" if self.background else ""
        article = "an" if not size and self.colour[0] in "aeiou" else "a"
        text = TEMPLATES[self.template].format(
            article=article,
            thing=f"{size}{self.colour} {self.shape}",
            size=size,
            colour=self.colour,
            shape=self.shape,
            moves=self.motion + speed,
            moving=_PARTICIPLES[self.motion] + speed,
            place=place,
        )
        return text.strip()


TEMPLATES = (
    "{article} {thing} {moves} {place}",
    "{article} {thing} {moving} {place}",
    "{place} {article} {thing} {moves}",
    "a video of {article} {thing} {moving} {place}",
    "the {size}{shape} is {colour} and {moves} {place}",
)
_IS_VERTICAL = tuple("up" in motion or "down" in motion for motion in MOTIONS)
_IS_BACKWARDS = tuple(motion in ("moves left", "moves up", "turns counterclockwise") for motion in MOTIONS)
_IS_BOUNCE = tuple(motion.startswith("bounces") for motion in MOTIONS)
_IS_TURN = tuple(motion.startswith("turns") for motion in MOTIONS)
_PARTICIPLES = {
    motion: motion.replace("moves", "moving").replace("bounces", "bouncing").replace("turns", "turning")
    for motion in MOTIONS
}


@dataclasses.dataclass(frozen=True)
class ClipBatch:
    """What B clips of T frames show, all on one device. Classes are int64 indices into the tuples and dicts above."""

    colour: torch.Tensor  # [B]
    shape: torch.Tensor  # [B]
    motion: torch.Tensor  # [B]
    background: torch.Tensor  # [B]
    size: torch.Tensor  # [B]
    speed: torch.Tensor  # [B]
    radius: torch.Tensor  # [B] float32, pixels: of the disc of the shape's area
    position: torch.Tensor  # [B, T, 2] float32, pixels: x and y of the shape's centroid
    angle: torch.Tensor  # [B, T] float32, radians
    height: int  # pixels
    width: int  # pixels

    def __len__(self) -> int:
        return self.colour.shape[0]

    @property
    def frames(self) -> int:
        """T."""
        return self.angle.shape[1]


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """Whether the combination belongs to the held-out split: one in eleven, with every colour, shape and motion.

    The rule: colour + 3 shape + 5 motion, as indices, is divisible by 11.
    """
    number = _COLOUR_NAMES.index(colour) + 3 * SHAPES.index(shape) + 5 * MOTIONS.index(motion)
    return number % 11 == 0


@functools.cache
def combinations(split: Split = "all") -> tuple[tuple[str, str, str], ...]:
    """Every (colour, shape, motion) of a split: circles and rings do not turn."""
    return tuple(
        (colour, shape, motion)
        for colour in COLOURS
        for shape in SHAPES
        for motion in MOTIONS
        if SYMMETRY[shape] or not motion.startswith("turns")
        if split == "all" or is_held_out(colour, shape, motion) == (split == "held_out")
    )


def allowed_backgrounds(colour: str) -> tuple[str, ...]:
    """The backgrounds that `colour` stands out from."""
    return tuple(name for name, rgb in BACKGROUNDS.items() if math.dist(rgb, COLOURS[colour]) >= 0.4)


@functools.cache
def caption_words() -> tuple[str, ...]:
    """Every word that a caption can have, sorted."""
    words: set[str] = {"a", "an"}
    for template in range(len(TEMPLATES)):
        for colour, shape, motion in combinations():
            for background in allowed_backgrounds(colour):
                for size, speed in zip(SIZES, SPEEDS, strict=True):
                    words.update(Clip(colour, shape, motion, background, size, speed, template).caption().split())
    return tuple(sorted(words))


def sample_clips(count: int, seed: int, split: Split = "all") -> list[Clip]:
    """`count` random clips of a split; the same for the same arguments."""
    rng = random.Random(f"clips {seed}")
    pool = combinations(split)
    return [_with_words(rng, *rng.choice(pool)) for _ in range(count)]


def prompts(count: int, seed: int, split: Split = "all") -> list[Clip]:
    """`count` clips to evaluate with, as even over colours, shapes, motions and combinations as the split allows.

    Each is of a combination used least so far, of these one whose colour, shape and motion were used least together.
    """
    rng = random.Random(f"prompts {seed}")
    pool = list(combinations(split))
    used: dict[object, int] = {}
    found = []
    for _ in range(count):
        rng.shuffle(pool)
        best = min(pool, key=lambda each: (used.get(each, 0), sum(used.get(name, 0) ** 2 for name in each)))
        for key in (best, *best):
            used[key] = used.get(key, 0) + 1
        found.append(_with_words(rng, *best))
    return found


def sample_batch(
    count: int,
    generator: torch.Generator,
    device: torch.device | str,
    *,
    frames: int = FRAMES,
    height: int = SIDE,
    width: int = SIDE,
    split: Split = "all",
    spread: float = 1.0,
) -> ClipBatch:
    """`count` random clips, evenly over the combinations of the split, without leaving the device.

    generator: of that device; another kind of device draws other clips from the same seed.
    spread: share of each range, around its middle, from which what no caption tells is drawn: where the shape starts,
    its exact size and speed, its tilt. At a small share all ways lead through the middle of the frame.
    Raises ValueError for fewer than 12 frames, a side under 32 pixels or a spread that is no share.
    """
    import torch

    if not 0.0 <= spread <= 1.0:
        raise ValueError(f"a spread of {spread}; it is a share, from 0 to 1")
    pool = _combination_table(split, str(device))
    colour, shape, motion = pool[torch.randint(len(pool), (count,), generator=generator, device=device)].unbind(1)
    background, size, speed = _draw_rest(colour, generator)
    return _animate(colour, shape, motion, background, size, speed, generator, frames, height, width, spread)


def enact(
    clips: Sequence[Clip],
    generator: torch.Generator,
    device: torch.device | str,
    *,
    frames: int = FRAMES,
    height: int = SIDE,
    width: int = SIDE,
) -> ClipBatch:
    """Clips that show what each caption asks for; what it does not say is drawn at random.

    generator: of that device. Raises ValueError for fewer than 12 frames or a side under 32 pixels.
    """
    import torch

    def indices(names: Sequence[str], values: Sequence[str | None]) -> torch.Tensor:
        found = [-1 if value is None else names.index(value) for value in values]
        return torch.tensor(found, dtype=torch.int64, device=device)

    colour = indices(_COLOUR_NAMES, [clip.colour for clip in clips])
    shape = indices(SHAPES, [clip.shape for clip in clips])
    motion = indices(MOTIONS, [clip.motion for clip in clips])
    said = (
        indices(_BACKGROUND_NAMES, [clip.background for clip in clips]),
        indices(SIZES, [clip.size for clip in clips]),
        indices(SPEEDS, [clip.speed for clip in clips]),
    )
    drawn = _draw_rest(colour, generator)
    background, size, speed = (torch.where(a < 0, b, a) for a, b in zip(said, drawn, strict=True))
    return _animate(colour, shape, motion, background, size, speed, generator, frames, height, width)


def describe(batch: ClipBatch, rng: random.Random) -> list[Clip]:
    """What captions say of a batch: colour, shape and motion, and each of the other words with a chance of a half."""
    columns = (batch.colour, batch.shape, batch.motion, batch.background, batch.size, batch.speed)
    return [
        _with_words(
            rng,
            _COLOUR_NAMES[colour],
            SHAPES[shape],
            MOTIONS[motion],
            _BACKGROUND_NAMES[background],
            SIZES[size],
            SPEEDS[speed],
        )
        for colour, shape, motion, background, size, speed in zip(*(c.tolist() for c in columns), strict=True)
    ]


def captions(batch: ClipBatch, rng: random.Random) -> list[str]:
    """One caption for each clip of a batch, worded at random."""
    return [clip.caption() for clip in describe(batch, rng)]


def render(batch: ClipBatch) -> torch.Tensor:
    """The pixels of a batch: [B, 3, T, H, W] float32 in [-1, 1], sRGB, anti-aliased, on the batch's device.

    Peak memory is about 8 floats for each of the B * T * H * W pixels.
    """
    import torch

    device = str(batch.colour.device)
    shown = coverage(
        batch.shape[:, None], batch.radius[:, None], batch.position, batch.angle, batch.height, batch.width
    )
    background = _palette(tuple(BACKGROUNDS.values()), device)[batch.background][:, :, None, None, None]
    colour = _palette(tuple(COLOURS.values()), device)[batch.colour][:, :, None, None, None]
    return torch.lerp(background, colour, shown[:, None])


def coverage(
    shape: torch.Tensor,
    radius: torch.Tensor,
    position: torch.Tensor,
    angle: torch.Tensor,
    height: int,
    width: int,
) -> torch.Tensor:
    """How much of each pixel a shape covers: [..., H, W] in [0, 1].

    shape, radius, angle: of a common shape [...] once broadcast; position [..., 2]; as in ClipBatch.
    A pixel is covered by 1/2 minus its centre's signed distance in pixels to the outline, clipped to [0, 1]. In polar
    coordinates, with the angle folded into the half period of the shape's symmetry, every outline here is a straight
    line or two, and the ring's hole a circle.
    """
    import torch

    table = _outline_table(str(radius.device))
    period, normal_1, offset_1, normal_2, offset_2, hole = table[shape][..., None, None, :].unbind(-1)
    pixels_x = torch.arange(width, device=radius.device) + 0.5
    pixels_y = torch.arange(height, device=radius.device) + 0.5
    x = (pixels_x - position[..., 0, None])[..., None, :]
    y = (pixels_y - position[..., 1, None])[..., :, None]
    scale = radius[..., None, None]
    from_centre = torch.hypot(x, y)
    folded = torch.atan2(x, -y) - angle[..., None, None]
    folded = (torch.remainder(folded + period / 2, period) - period / 2).abs()
    outside = torch.maximum(
        from_centre * torch.cos(folded - normal_1) - offset_1 * scale,
        from_centre * torch.cos(folded - normal_2) - offset_2 * scale,
    )
    return (0.5 - torch.maximum(outside, hole * scale - from_centre)).clamp(0.0, 1.0)


def reaches() -> tuple[float, ...]:
    """For each of SHAPES, the farthest that it reaches from its centroid, in radii of the disc of its area."""
    return tuple(_outline(shape)[1] for shape in SHAPES)


_COLOUR_NAMES = tuple(COLOURS)
_BACKGROUND_NAMES = tuple(BACKGROUNDS)


def _with_words(
    rng: random.Random,
    colour: str,
    shape: str,
    motion: str,
    background: str | None = None,
    size: str | None = None,
    speed: str | None = None,
) -> Clip:
    """A clip whose caption is worded at random; None: the word is drawn if the caption has it."""
    said = rng.getrandbits(3)
    return Clip(
        colour,
        shape,
        motion,
        background=(background or rng.choice(allowed_backgrounds(colour))) if said & 1 else None,
        size=(size or rng.choice(SIZES)) if said & 2 else None,
        speed=(speed or rng.choice(SPEEDS)) if said & 4 else None,
        template=int(rng.random() * len(TEMPLATES)),
    )


def _draw_rest(colour: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Background, size and speed [B] for colours [B]."""
    import torch

    count, device = len(colour), colour.device
    return (
        torch.multinomial(_background_weights(str(device))[colour], 1, generator=generator)[:, 0],
        torch.randint(len(SIZES), (count,), generator=generator, device=device),
        torch.randint(len(SPEEDS), (count,), generator=generator, device=device),
    )


def _outline(shape: str) -> tuple[tuple[float, ...], float]:
    """A shape of area pi: its row of the outline table and how far it reaches.

    The row: period of the symmetry; angle and offset of a first line's normal; of a second one's; radius of the hole.
    """
    no_hole = -1e3
    if shape == "circle":
        return (1e-6, 0.0, 1.0, 0.0, 1.0, no_hole), 1.0
    if shape == "ring":
        inner = 0.55  # of the outer radius
        outer = 1.0 / math.sqrt(1.0 - inner**2)
        return (1e-6, 0.0, outer, 0.0, outer, inner * outer), outer
    period = math.tau / SYMMETRY[shape]
    if shape == "cross":
        arm = 3.0 * math.sqrt(math.pi / 20.0)  # half its length; a third of it is half its width
        return (period, 0.0, arm, math.pi / 2, arm / 3, no_hole), arm * math.sqrt(1.0 + 1.0 / 9.0)
    # A corner at angle 0 and the next, outer or inner, after half a period: one line joins them.
    ratio = {"square": math.cos(math.pi / 4), "triangle": 0.5, "star": 0.45}[shape]
    corner = math.sqrt(math.pi / (SYMMETRY[shape] * ratio * math.sin(period / 2)))
    normal = math.atan2(1.0 - ratio * math.cos(period / 2), ratio * math.sin(period / 2))
    return (period, normal, corner * math.cos(normal), normal, corner * math.cos(normal), no_hole), corner


def _animate(
    colour: torch.Tensor,
    shape: torch.Tensor,
    motion: torch.Tensor,
    background: torch.Tensor,
    size: torch.Tensor,
    speed: torch.Tensor,
    generator: torch.Generator,
    frames: int,
    height: int,
    width: int,
    spread: float = 1.0,
) -> ClipBatch:
    """Draw radius, track and angles [B, T] for classes [B]."""
    import torch

    if frames < _MINIMUM_FRAMES or min(height, width) < _MINIMUM_SIDE:
        raise ValueError(
            f"{frames} frames of {height} x {width} pixels; use at least {_MINIMUM_FRAMES} frames of "
            f"{_MINIMUM_SIDE} x {_MINIMUM_SIDE}"
        )
    device = colour.device

    def table(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    def uniform() -> torch.Tensor:
        return torch.rand(len(colour), generator=generator, device=device)

    def between(low: torch.Tensor | float, high: torch.Tensor | float) -> torch.Tensor:
        share = 0.5 + spread * (uniform() - 0.5)
        return low + share * (high - low)

    def in_range(ranges: torch.Tensor) -> torch.Tensor:
        return between(ranges[:, 0], ranges[:, 1])

    time = torch.linspace(0.0, 1.0, frames, device=device)
    radius = in_range(table(_RADIUS)[size]) * min(height, width)
    margin = radius * table(reaches())[shape] + _MARGIN
    vertical, backwards, is_bounce, is_turn = (
        torch.tensor(values, device=device)[motion] for values in (_IS_VERTICAL, _IS_BACKWARDS, _IS_BOUNCE, _IS_TURN)
    )
    along = torch.where(vertical, float(height), float(width))
    across = torch.where(vertical, float(width), float(height))
    way = along - 2 * margin

    low, high = (table(_DISTANCE)[speed] * along[:, None]).unbind(1)
    distance = between(low, torch.minimum(high, way))
    moved = between(0.0, way - distance)[:, None] + distance[:, None] * time

    before = between(*_BEFORE_WALL) * way
    unfolded = (way - before)[:, None] + (before + in_range(table(_AFTER_WALL)[speed]) * way)[:, None] * time
    bounced = way[:, None] - (torch.remainder(unfolded, 2 * way[:, None]) - way[:, None]).abs()

    resting = between(0.0, way)[:, None].expand(-1, frames)
    travelled = torch.where(is_turn[:, None], resting, torch.where(is_bounce[:, None], bounced, moved))
    mirrored = torch.where(is_bounce, uniform() < 0.5, backwards)[:, None]
    main = torch.where(mirrored, along[:, None] - margin[:, None] - travelled, margin[:, None] + travelled)
    other = between(margin, across - margin)[:, None].expand(-1, frames)
    position = torch.where(vertical[:, None, None], torch.stack((other, main), -1), torch.stack((main, other), -1))

    turned = torch.deg2rad(in_range(table(_ROTATION)[speed]))[:, None] * time
    half_period = math.pi / table([max(1, symmetry) for symmetry in SYMMETRY.values()])[shape]
    turned = between(-half_period, half_period)[:, None] + torch.where(backwards[:, None], -turned, turned)
    tilt = math.radians(_TILT)
    angle = torch.where(is_turn[:, None], turned, between(-tilt, tilt)[:, None].expand(-1, frames))
    return ClipBatch(colour, shape, motion, background, size, speed, radius, position, angle, height, width)


# Small tables, one for each device that asked.


@functools.cache
def _combination_table(split: Split, device: str) -> torch.Tensor:
    import torch

    rows = [
        (_COLOUR_NAMES.index(colour), SHAPES.index(shape), MOTIONS.index(motion))
        for colour, shape, motion in combinations(split)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=device)


@functools.cache
def _background_weights(device: str) -> torch.Tensor:
    import torch

    rows = [[float(name in allowed_backgrounds(colour)) for name in BACKGROUNDS] for colour in COLOURS]
    return torch.tensor(rows, device=device)


@functools.cache
def _outline_table(device: str) -> torch.Tensor:
    import torch

    return torch.tensor([_outline(shape)[0] for shape in SHAPES], dtype=torch.float32, device=device)


@functools.cache
def _palette(rgb: tuple[tuple[float, float, float], ...], device: str) -> torch.Tensor:
    import torch

    return torch.tensor(rgb, dtype=torch.float32, device=device) * 2.0 - 1.0
