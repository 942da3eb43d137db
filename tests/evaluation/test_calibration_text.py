"""How files become windows, by hand, and that no window is in two parts."""

from __future__ import annotations

import pathlib

import pytest

from edgerun.checkpoint import Checkpoint
from edgerun.errors import EdgerunError
from edgerun.evaluation.calibration_text import cut, make_text
from edgerun.evaluation.text_files import read_texts
from tests.models.tiny_checkpoints import save_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def test_long_texts_are_cut_from_their_end_and_short_ones_joined() -> None:
    long, short, exact = list(range(8)), [10, 11], [20, 21, 22]
    assert cut([long, short, exact, short], 3) == [(5, 6, 7), (2, 3, 4), (20, 21, 22), (10, 11, 10)]
    assert cut([[1, 2]], 3) == []


def test_windows_have_the_start_token_and_the_texts_own_end(checkpoint: Checkpoint) -> None:
    texts = [f"{i:02d}" + "x" * 40 + f"end {i:02d}" for i in range(9)]
    made = make_text(checkpoint, texts, 32, 3, seed=0)
    windows = made.chosen_by + made.held_out + made.proof
    assert len(made.chosen_by) == len(made.held_out) == len(made.proof) == 3 and len(set(windows)) == 9
    assert all(len(window) == 32 and window[0] == 256 for window in windows)
    assert all(bytes(window[-6:-2]).decode() == "end " for window in windows)
    short = made.shortened(windows[0], 10)
    assert short == (256, *windows[0][-9:])


def test_the_seed_draws_the_windows_and_the_hash_is_the_texts(checkpoint: Checkpoint) -> None:
    texts = [f"text {i:02d} " * 8 for i in range(30)]
    one, same, other = (make_text(checkpoint, texts, 32, 4, seed=seed) for seed in (0, 0, 1))
    assert one == same and one.chosen_by != other.chosen_by and one.sha256 == other.sha256
    assert make_text(checkpoint, texts[:-1], 32, 4, seed=0).sha256 != one.sha256


def test_too_little_text_says_what_is_missing(checkpoint: Checkpoint) -> None:
    with pytest.raises(EdgerunError, match="gives 3 different windows of 32 tokens, 6 are needed"):
        make_text(checkpoint, ["a" * 31 + "b" * 31 + "c" * 31], 32, 2, seed=0)


@pytest.mark.parametrize("length", [60, 20])  # of a text: longer than a window, and shorter
def test_text_that_comes_again_counts_once(length: int, checkpoint: Checkpoint) -> None:
    texts = [f"{i:02d}" * (length // 2) for i in range(30)]
    once, twice = (make_text(checkpoint, given, 32, 5, seed=0) for given in (texts, texts + texts))
    assert once == twice
    with pytest.raises(EdgerunError, match="different windows"):
        make_text(checkpoint, texts[:10] * 10, 32, 7, seed=0)


def test_a_window_that_comes_again_counts_once(checkpoint: Checkpoint) -> None:
    """Two files that end alike: their last windows are one."""
    end = "".join(f"{i:03d}" for i in range(62))  # 6 windows of 31 bytes
    made = make_text(checkpoint, [end, "another beginning of this " + end], 32, 2, seed=0)
    assert len(set(made.chosen_by + made.held_out + made.proof)) == 6


def test_a_file_that_is_no_text_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"ok \xff\xfe")
    with pytest.raises(EdgerunError, match=r"a\.bin is not UTF-8 at byte 3"):
        read_texts([tmp_path / "a.bin"])
    with pytest.raises(EdgerunError, match=r"nowhere cannot be read"):
        read_texts([tmp_path / "nowhere"])
