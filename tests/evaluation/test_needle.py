"""The needle grid: the needle stands where the depth says."""

import pytest

from edgerun.evaluation import needle


@pytest.mark.parametrize("haystack", ["noise", "prose"])
@pytest.mark.parametrize("depth", [0, 25, 50, 75, 100])
def test_needle_stands_at_its_depth(haystack: str, depth: int) -> None:
    sample = needle.generate(4096, depth, seed=0, index=3, haystack=haystack)
    begin = sample.prompt.index("afterwards.\n") + len("afterwards.\n")
    end = sample.prompt.index("\nWhat is the special")
    statement = f" is: {sample.answers[0]}."
    share = (sample.prompt.index(statement) - begin) / (end - begin)
    assert share == pytest.approx(depth / 100, abs=0.04)
    assert sample.prompt.count(statement) == 1


@pytest.mark.parametrize("length", [512, 2048, 8192])
def test_prompt_and_answer_fit_the_length(length: int) -> None:
    sample = needle.generate(length, 50, seed=0, index=0)
    assert length - 100 < len(sample.prompt.encode()) + sample.max_new_tokens + 1 <= length


def test_grid_cells_and_indices_have_their_own_needles() -> None:
    cells = {needle.generate(2048, depth, 0, index).answers for depth in (0, 50, 100) for index in range(10)}
    assert len(cells) == 30
    assert needle.generate(2048, 50, 0, 1) == needle.generate(2048, 50, 0, 1)


def test_score_wants_the_whole_value() -> None:
    sample = needle.generate(2048, 50, 0, 0)
    assert needle.score(sample, f" {sample.answers[0]}.") == 1.0
    assert needle.score(sample, sample.answers[0][:-1]) == 0.0


def test_bad_depth_and_haystack_are_refused() -> None:
    with pytest.raises(ValueError, match="depth_percent is 101"):
        needle.generate(2048, 101, 0, 0)
    with pytest.raises(ValueError, match="unknown haystack 'essay'"):
        needle.generate(2048, 50, 0, 0, haystack="essay")
