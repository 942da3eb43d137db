"""Token merging: groups, the two maps and positions, against cases worked by hand."""

from __future__ import annotations

import pytest
import torch

from edgerun.techniques.temporal_token_merging import PAPER_PARTS, adjacent_groups, frame_merge, similar_groups


@pytest.mark.parametrize(
    ("frames", "alone", "expected"),
    [
        (1, "first", [[0]]),
        (2, "first", [[0, 1]]),
        (3, "first", [[0], [1, 2]]),
        (3, "last", [[0, 1], [2]]),
        (4, "last", [[0, 1], [2, 3]]),
        (5, "first", [[0], [1, 2], [3, 4]]),
    ],
)
def test_groups(frames: int, alone: str, expected: list[list[int]]) -> None:
    assert adjacent_groups(frames, alone=alone) == expected


def test_means_replication_and_positions() -> None:
    merge = frame_merge([[0], [1, 2]])
    tokens = torch.tensor([1.0, 3.0, 7.0]).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    assert merge.narrow(tokens)[0, :, 0, 0].tolist() == [1.0, 5.0]
    assert merge.widen(merge.narrow(tokens))[0, :, 1, 3].tolist() == [1.0, 5.0, 5.0]
    assert merge.positions.tolist() == [0.0, 1.5]
    assert frame_merge([[0, 1], [2, 3]]).positions.tolist() == [0.5, 2.5]  # 2j + 1/2
    assert merge.parts == frozenset(PAPER_PARTS)


def test_similar_groups_split_what_differs() -> None:
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    frames = torch.stack([first, first * 3, first, second])[None, :, None, :].expand(1, 4, 5, 2)
    assert similar_groups(frames, 0.9) == [[0, 1], [2], [3]]
    assert similar_groups(frames, -1.0) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("groups", [[], [[0], [2]], [[1, 0]], [[0], [0]]])
def test_groups_that_do_not_name_every_frame_once_are_refused(groups: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="once and in order"):
        frame_merge(groups)


def test_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="not norm"):
        frame_merge([[0]], frozenset({"norm"}))
    with pytest.raises(ValueError, match="0 frames"):
        adjacent_groups(0)
    with pytest.raises(ValueError, match="'middle'"):
        adjacent_groups(3, alone="middle")
