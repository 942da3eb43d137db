"""What zoo:text is calibrated on was seen by neither its training nor its evaluation."""

from __future__ import annotations

import pathlib

import pytest

from bench import calibration_documents as documents
from edgerun.evaluation import held_out_text, ruler
from edgerun.evaluation.sample import EVALUATION_SPLIT, TRAINING_SPLIT


def test_documents_are_of_a_split_of_their_own() -> None:
    mine = documents.document("niah_single_1", 0, 0)
    assert mine == documents.document("niah_single_1", 0, 0)
    for split in (EVALUATION_SPLIT, TRAINING_SPLIT):
        other = ruler.generate_document("niah_single_1", documents.LENGTH, 0, 0, split=split)
        assert not mine.startswith(other.text)


def test_sources_are_held_out_and_two_seeds_share_none() -> None:
    even, odd = (set(documents.sources(seed, 4)) for seed in (4, 5))
    assert even.isdisjoint(odd) and len(even) == len(odd) == 4
    assert even | odd <= set(held_out_text.held_out_sources())
    assert all(path.stat().st_size >= documents.LEAST_BYTES for path in even | odd)


def test_too_few_sources_are_said_in_one_line(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SystemExit, match=r"1000 sources are asked for, this Python has .*: lower --sources"):
        documents.main(["--out", str(tmp_path / "out"), "--sources", "1000"])
    assert not (tmp_path / "out").exists()


def test_the_folder_has_what_was_asked_for(tmp_path: pathlib.Path) -> None:
    documents.main(["--out", str(tmp_path), "--tasks", "vt", "--documents", "2", "--sources", "3"])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[-2:] == ["vt_0_0.txt", "vt_0_1.txt"] and len(names) == 5
