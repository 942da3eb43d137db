"""How files become windows, by hand, and that no window is both chosen by and held out."""

from __future__ import annotations

import pathlib

import pytest

from edgerun.checkpoint import Checkpoint
from edgerun.errors import EdgerunError
from edgerun.evaluation.calibration_text import cut, make_text, read_texts
from tests.models.tiny_checkpoints import save_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def test_long_texts_are_cut_from_their_end_and_short_ones_joined() -> None:
    long, short, exact = list(range(8)), [10, 11], [20, 21, 22]
    assert cut([long, short, exact, short], 3) == [(5, 6, 7), (2, 3, 4), (20, 21, 22), (10, 11, 10)]
    assert cut([[1, 2]], 3) == []


def test_windows_have_the_start_token_and_the_texts_own_end(checkpoint: Checkpoint) -> None:
    texts = [f"{i:02d}" + "x" * 40 + f"end {i:02d}" for i in range(8)]
    made = make_text(checkpoint, texts, 32, 3, seed=0)
    windows = made.chosen_by + made.held_out
    assert len(made.chosen_by) == len(made.held_out) == 3 and len(set(windows)) == 6
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
    with pytest.raises(EdgerunError, match="gives 3 windows of 32 tokens, 4 are needed"):
        make_text(checkpoint, ["x" * 100], 32, 2, seed=0)


def test_a_file_that_is_no_text_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"ok \xff\xfe")
    with pytest.raises(EdgerunError, match=r"a\.bin is no UTF-8 text .*byte 3"):
        read_texts([tmp_path / "a.bin"])
