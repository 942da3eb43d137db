"""The parts that every generated task shares."""

import subprocess
import sys

import pytest

from edgerun.evaluation.sample import (
    Document,
    Question,
    Sample,
    fraction_found,
    insert_at_fractions,
    largest_fitting,
    seeded_random,
)


def sample_of(*answers: str) -> Sample:
    return Sample(task="t", prompt="p", answers=answers, max_new_tokens=8, length=64, index=0)


def test_fraction_found_counts_each_answer_once_and_ignores_case() -> None:
    assert fraction_found(sample_of("123", "abc"), "the ABC is here") == 0.5
    assert fraction_found(sample_of("123", "abc"), "abc abc 123") == 1.0
    assert fraction_found(sample_of("123"), "12 3") == 0.0
    assert fraction_found(sample_of("123"), "") == 0.0


def test_insert_at_fractions_puts_zero_first_and_one_last() -> None:
    lines = ["a", "b", "c"]
    assert insert_at_fractions(lines, [(0.0, "x")]) == ["x", "a", "b", "c"]
    assert insert_at_fractions(lines, [(1.0, "x")]) == ["a", "b", "c", "x"]
    assert insert_at_fractions(lines, [(0.6, "x"), (0.3, "y"), (0.6, "z")]) == ["a", "y", "b", "x", "z", "c"]
    assert insert_at_fractions([], [(0.5, "x")]) == ["x"]


def test_largest_fitting_leaves_less_than_one_unit_free() -> None:
    def build(size: int) -> Document:
        return Document("ten bytes " * size, (Question("?", ("7",), " 7"),))

    document = largest_fitting(build, 1000, len, unit=10)
    free = 1000 - 17 - len(document.text) - len("? 7")
    assert 0 <= free < 10


def test_largest_fitting_refuses_a_length_without_room() -> None:
    with pytest.raises(ValueError, match="length of 12 tokens is too short"):
        largest_fitting(lambda size: Document("x" * 20, ()), 12, len, unit=1)


def test_a_seed_gives_the_same_numbers_on_every_machine() -> None:
    rng = seeded_random("evaluation", "vt", 2048, 7, 0)
    assert [rng.randrange(1000) for _ in range(3)] == [211, 299, 485]
    assert seeded_random("train", "vt", 2048, 7, 0).random() != seeded_random("evaluation", "vt", 2048, 7, 0).random()


def test_generators_import_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from edgerun.evaluation import needle, ruler, statistics, threads;"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
