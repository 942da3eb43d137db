"""Generated clips: what a batch says is what is drawn, inside the frame, in words of a closed vocabulary."""

from __future__ import annotations

import collections
import itertools
import math
import random

import pytest
import torch

from edgerun.evaluation import clips


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("frames", "height", "width"), [(51, 48, 48), (12, 32, 32), (33, 64, 96)])
def test_every_shape_stays_inside_the_frame(frames: int, height: int, width: int) -> None:
    batch = clips.sample_batch(2000, generator(), "cpu", frames=frames, height=height, width=width)
    reach = (batch.radius * torch.tensor(clips.reaches())[batch.shape])[:, None]
    x, y = batch.position.unbind(-1)
    assert batch.position.shape == (2000, frames, 2)
    assert bool(((x - reach >= 0) & (x + reach <= width) & (y - reach >= 0) & (y + reach <= height)).all())


def test_tracks_show_the_motion() -> None:
    batch = clips.sample_batch(2000, generator(), "cpu")
    motion = [clips.MOTIONS[i] for i in batch.motion.tolist()]
    first, last = batch.position[:, 0], batch.position[:, -1]
    for name, axis, sign in (
        ("moves left", 0, -1),
        ("moves right", 0, 1),
        ("moves up", 1, -1),
        ("moves down", 1, 1),
    ):
        rows = [i for i, found in enumerate(motion) if found == name]
        assert float(((last - first)[rows, axis] * sign).min()) > 0.16 * clips.SIDE
        assert float((last - first)[rows, 1 - axis].abs().max()) == 0.0
    for name, axis in (("bounces left and right", 0), ("bounces up and down", 1)):
        rows = [i for i, found in enumerate(motion) if found == name]
        steps = batch.position[rows].diff(dim=1)[..., axis].sign()
        reversals = (steps[:, 1:] * steps[:, :-1] < 0).sum(1)
        assert int(reversals.min()) >= 1
    for name, sign in (("turns clockwise", 1), ("turns counterclockwise", -1)):
        rows = [i for i, found in enumerate(motion) if found == name]
        rotation = (batch.angle[rows, -1] - batch.angle[rows, 0]) * sign
        symmetry = torch.tensor([clips.SYMMETRY[clips.SHAPES[i]] for i in batch.shape[rows].tolist()])
        assert int(symmetry.min()) > 0
        assert bool((rotation >= 0.5 * math.tau / symmetry).all())
        assert bool((rotation / 50 < 0.25 * math.tau / symmetry).all())
        assert float((last - first)[rows].abs().max()) == 0.0


@pytest.mark.parametrize("spread", [0.0, 0.25])
def test_a_small_spread_leads_through_the_middle(spread: float) -> None:
    batch = clips.sample_batch(2000, generator(), "cpu", spread=spread)
    moves = batch.motion < clips.MOTIONS.index("bounces left and right")
    turns = batch.motion >= clips.MOTIONS.index("turns clockwise")
    middle = (batch.position[:, 0] + batch.position[:, -1])[moves | turns] / 2
    assert float((middle - clips.SIDE / 2).abs().max()) <= spread * clips.SIDE / 2 + 1e-5
    assert float(batch.angle[~turns].abs().max()) <= spread * math.radians(10.0) + 1e-6
    whole = clips.sample_batch(2000, generator(), "cpu")
    for size in range(len(clips.SIZES)):
        some, all_ = (
            float(one.radius[one.size == size].max() - one.radius[one.size == size].min()) for one in (batch, whole)
        )
        assert some <= 1.01 * spread * all_ + 1e-5
    bounces = ~(moves | turns)
    first = batch.position[bounces].diff(dim=1)[:, 0].sum(-1).sign()
    assert set(first.tolist()) == {-1.0, 1.0}


def test_words_of_size_and_speed_part_what_they_name() -> None:
    batch = clips.sample_batch(2000, generator(), "cpu")
    assert float(batch.radius[batch.size == 0].max()) < float(batch.radius[batch.size == 1].min())
    for motions in ((0, 1, 2, 3), (6, 7)):
        rows = torch.isin(batch.motion, torch.tensor(motions))
        way = batch.position.diff(dim=1).norm(dim=-1).sum(1) + batch.angle.diff(dim=1).abs().sum(1)
        assert float(way[rows & (batch.speed == 0)].max()) < float(way[rows & (batch.speed == 1)].min())


def test_every_shape_has_the_area_of_its_radius() -> None:
    for shape in range(len(clips.SHAPES)):
        for angle in (0.0, 0.3, 1.0):
            drawn = clips.coverage(
                torch.tensor(shape), torch.tensor(8.0), torch.tensor([24.3, 23.9]), torch.tensor(angle), 48, 48
            )
            assert float(drawn.sum()) == pytest.approx(math.pi * 64, rel=0.02)


def test_shapes_are_drawn_where_and_as_stated() -> None:
    def drawn(shape: str, angle: float) -> torch.Tensor:
        index = torch.tensor(clips.SHAPES.index(shape))
        return clips.coverage(
            index, torch.tensor(8.0), torch.tensor([20.5, 24.5]), torch.tensor(math.radians(angle)), 48, 48
        )

    triangle = drawn("triangle", 0)  # upright: its corner is 12.4 above the centroid, its base 6.2 below
    assert triangle[24 - 11, 20] > 0.4 and triangle[24 - 14, 20] == 0.0
    assert triangle[24 + 5, 20] == 1.0 and triangle[24 + 8, 20] == 0.0
    right = drawn("triangle", 90)  # a quarter clockwise: the corner points right
    assert right[24, 20 + 11] > 0.4 and right[24, 20 - 8] == 0.0
    square = drawn("square", 45)  # a corner up at 0, so upright at 45 degrees: half a side is 7.09
    assert square[24 - 6, 20 - 6] == 1.0 and square[24, 20 + 8] == 0.0
    assert drawn("ring", 0)[24, 20] == 0.0 and drawn("circle", 0)[24, 20] == 1.0
    cross = drawn("cross", 0)
    assert cross[24 - 8, 20] == 1.0 and cross[24, 20 + 8] == 1.0 and cross[24 - 6, 20 - 6] == 0.0


def test_pixels_have_the_palette_s_colours() -> None:
    clip = clips.Clip("orange", "circle", "moves left", "navy")
    batch = clips.enact([clip], generator(), "cpu")
    video = clips.render(batch)
    assert video.shape == (1, 3, 51, 48, 48) and video.dtype == torch.float32
    assert float(video.min()) >= -1.0 and float(video.max()) <= 1.0
    x, y = batch.position[0, 7].long().tolist()
    assert torch.allclose(video[0, :, 7, y, x], torch.tensor(clips.COLOURS["orange"]) * 2 - 1)
    assert torch.allclose(video[0, :, 7, 0, 0], torch.tensor(clips.BACKGROUNDS["navy"]) * 2 - 1)


def test_one_seed_makes_one_batch() -> None:
    one, same, other = (clips.render(clips.sample_batch(8, generator(seed), "cpu")) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert clips.sample_clips(20, 1) == clips.sample_clips(20, 1) != clips.sample_clips(20, 2)
    assert clips.prompts(20, 1) == clips.prompts(20, 1) != clips.prompts(20, 2)


def test_a_batch_enacts_what_its_clips_say() -> None:
    wanted = clips.sample_clips(300, seed=0)
    batch = clips.enact(wanted, generator(), "cpu")
    for i, clip in enumerate(wanted):
        assert clip.colour == list(clips.COLOURS)[batch.colour[i]]
        assert clip.shape == clips.SHAPES[batch.shape[i]]
        assert clip.motion == clips.MOTIONS[batch.motion[i]]
        background = list(clips.BACKGROUNDS)[batch.background[i]]
        assert clip.background in (None, background) and background in clips.allowed_backgrounds(clip.colour)
        assert clip.size in (None, clips.SIZES[batch.size[i]])
        assert clip.speed in (None, clips.SPEEDS[batch.speed[i]])


def test_captions_say_what_the_batch_shows() -> None:
    batch = clips.sample_batch(500, generator(), "cpu")
    described = clips.describe(batch, random.Random(0))
    assert [clip.caption() for clip in described] == clips.captions(batch, random.Random(0))
    for i, clip in enumerate(described):
        words = clip.caption().split()
        assert clip.colour == list(clips.COLOURS)[batch.colour[i]] and clip.colour in words
        assert clip.shape == clips.SHAPES[batch.shape[i]] and clip.shape in words
        assert clip.motion == clips.MOTIONS[batch.motion[i]] and clip.motion.split()[-1] in words
        assert clip.background in (None, list(clips.BACKGROUNDS)[batch.background[i]])
        assert clip.speed in (None, clips.SPEEDS[batch.speed[i]])
        assert (clip.size in words) == (clip.size is not None)
    said = collections.Counter((clip.background is None, clip.size is None, clip.speed is None) for clip in described)
    assert len(said) == 8


def test_captions_have_only_words_of_the_vocabulary() -> None:
    vocabulary = set(clips.caption_words())
    used: set[str] = set()
    for caption in clips.captions(clips.sample_batch(4000, generator(), "cpu"), random.Random(0)):
        used.update(caption.split(" "))
    assert used == vocabulary


@pytest.mark.parametrize(
    ("clip", "caption"),
    [
        (clips.Clip("orange", "star", "moves up"), "an orange star moves up"),
        (
            clips.Clip("orange", "star", "moves up", "navy", "small", "slowly"),
            "a small orange star moves up slowly on a navy background",
        ),
        (clips.Clip("red", "ring", "bounces up and down", template=1), "a red ring bouncing up and down"),
        (clips.Clip("red", "ring", "moves left", "grey", template=2), "on a grey background a red ring moves left"),
        (
            clips.Clip("blue", "cross", "turns clockwise", speed="quickly", template=3),
            "a video of a blue cross turning clockwise quickly",
        ),
        (
            clips.Clip("blue", "square", "moves down", size="large", template=4),
            "the large square is blue and moves down",
        ),
    ],
)
def test_templates_make_english(clip: clips.Clip, caption: str) -> None:
    assert clip.caption() == caption


def test_splits_part_the_combinations() -> None:
    everything, seen, held_out = (set(clips.combinations(split)) for split in ("all", "seen", "held_out"))
    assert len(everything) == 8 * (6 * 6 + 4 * 2)
    assert seen | held_out == everything and not seen & held_out
    for part in range(3):
        assert {each[part] for each in held_out} == {each[part] for each in everything}
    for split, allowed in (("seen", seen), ("held_out", held_out)):
        batch = clips.sample_batch(1000, generator(), "cpu", split=split)
        drawn = {(clip.colour, clip.shape, clip.motion) for clip in clips.describe(batch, random.Random(0))}
        assert drawn <= allowed
        assert {(clip.colour, clip.shape, clip.motion) for clip in clips.sample_clips(500, 0, split)} <= allowed


def test_prompts_are_balanced() -> None:
    found = clips.prompts(200, seed=0)
    for attribute, classes in (("colour", 8), ("shape", 6), ("motion", 8)):
        counts = collections.Counter(getattr(clip, attribute) for clip in found)
        assert len(counts) == classes
        assert max(counts.values()) - min(counts.values()) <= 2
    assert len({(clip.colour, clip.shape, clip.motion) for clip in found}) == 200


def test_colours_are_apart_from_one_another_and_from_their_backgrounds() -> None:
    assert min(math.dist(a, b) for a, b in itertools.combinations(clips.COLOURS.values(), 2)) >= 0.4
    for colour, rgb in clips.COLOURS.items():
        allowed = clips.allowed_backgrounds(colour)
        assert len(allowed) >= 3
        assert all(math.dist(rgb, clips.BACKGROUNDS[name]) >= 0.4 for name in allowed)
    assert "white" not in clips.allowed_backgrounds("white")


def test_too_few_frames_or_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="11 frames of 48 x 48"):
        clips.sample_batch(1, generator(), "cpu", frames=11)
    with pytest.raises(ValueError, match=r"a spread of 1\.5"):
        clips.sample_batch(1, generator(), "cpu", spread=1.5)
    with pytest.raises(ValueError, match="51 frames of 48 x 31"):
        clips.enact(clips.sample_clips(1, 0), generator(), "cpu", width=31)


def test_an_empty_batch_is_a_batch() -> None:
    batch = clips.sample_batch(0, generator(), "cpu")
    assert len(batch) == 0 and clips.captions(batch, random.Random(0)) == []
    assert clips.render(batch).shape == (0, 3, 51, 48, 48)
