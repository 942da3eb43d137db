"""A record is read without a change, written by one run at a time, and a file that is none stays as it is."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from edgerun.errors import EdgerunError
from edgerun.evaluation import record_lines


def number(values: dict[str, int]) -> int:
    return values["n"]


def numbers(path: pathlib.Path) -> list[int]:
    return record_lines.read(path, number, "a number")


def test_what_is_appended_is_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "r.jsonl"
    assert numbers(path) == []
    with record_lines.writer(path) as append:
        append({"n": 1})
        assert numbers(path) == [1]  # while the run still writes
        append({"n": 2})
    assert numbers(path) == [1, 2]


def test_a_line_cut_short_stays_until_a_run_appends(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"n": 1}\n{"n": 2')
    assert numbers(path) == [1] and path.read_text() == '{"n": 1}\n{"n": 2'
    with record_lines.writer(path):
        pass
    assert path.read_text() == '{"n": 1}\n{"n": 2'
    with record_lines.writer(path) as append:
        append({"n": 3})
        append({"n": 4})
    assert path.read_text() == '{"n": 1}\n{"n": 3}\n{"n": 4}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a report without a line's end", "29 bytes but no whole line"),
        (b'{"n": 1}', "8 bytes but no whole line"),
        (b'{\n "version": 2\n}', "line 1 is not a number"),
        (b"[]\n", "line 1 is not a number .list where an object should be"),
        (b"\n", "line 1 is not a number"),
        (b'{"n": 1}\n3\n', "line 2 is not a number"),
        (b'{"m": 1}\n', "line 1 is not a number"),
        (b"\x89PNG\r\n\x1a\n\xff\n", "not UTF-8 at byte 0"),
    ],
)
def test_a_file_that_is_no_record_is_refused_and_kept(content: bytes, message: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with record_lines.writer(path), pytest.raises(EdgerunError, match=message) as refused:
        numbers(path)
    assert path.read_bytes() == content
    assert "pass another --output" in str(refused.value) and "\n" not in str(refused.value)


def test_a_parser_that_meets_another_shape_refuses(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"n": 1}\n')
    with pytest.raises(EdgerunError, match="line 1 is not a name"):
        record_lines.read(path, lambda values: values["n"].upper(), "a name")


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "r.jsonl"
    second = (
        "import pathlib, sys\nfrom edgerun.evaluation import record_lines\n"
        "with record_lines.writer(pathlib.Path(sys.argv[1])) as append:\n    append({'n': 2})\n"
    )
    command = [sys.executable, "-c", second, str(path)]
    with record_lines.writer(path) as append:
        append({"n": 1})
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 1 and "r.jsonl is being written by another run" in refused.stderr
    subprocess.run(command, check=True)
    assert numbers(path) == [1, 2]


def test_lines_of_a_run_that_came_between_reading_and_writing_stay(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"n": 1}\n{"n"')
    assert numbers(path) == [1]
    with record_lines.writer(path) as append:  # another run
        append({"n": 2})
    with record_lines.writer(path) as append:
        append({"n": 3})
    assert numbers(path) == [1, 2, 3]


def test_a_run_that_appended_nothing_leaves_no_new_file(tmp_path: pathlib.Path) -> None:
    with record_lines.writer(tmp_path / "new.jsonl"):
        pass
    (tmp_path / "mine.jsonl").touch()
    with record_lines.writer(tmp_path / "mine.jsonl"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]


def test_an_append_is_a_whole_line_at_once(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "r.jsonl"
    with record_lines.writer(path) as append:
        for n in range(3):
            append({"n": n, "text": "ü\n\u2028" * 3000})
            assert path.read_bytes().endswith(b"\n") and json.loads(path.read_text().splitlines()[-1])["n"] == n
    assert numbers(path) == [0, 1, 2]


def test_without_a_file_nothing_is_kept(tmp_path: pathlib.Path) -> None:
    with record_lines.writer(None) as append:
        append({"n": 1})
    assert list(tmp_path.iterdir()) == []
