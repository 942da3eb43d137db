"""`edgerun validate`, `bench` and `inspect` of a video bundle."""

from __future__ import annotations

import json
import pathlib

import pytest

from edgerun import compare
from edgerun.bundle import Bundle
from edgerun.cli import main
from edgerun.commands.video_inspect import least_memory_bytes
from edgerun.report import Report
from tests import shared_video_bundle
from tests.shared_bundle import changed_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return shared_video_bundle.bundle(tmp_path_factory)


def report_of(arguments: list[str], capsys: pytest.CaptureFixture, status: int = 0) -> Report:
    assert main([*arguments, "--json"]) == status
    return Report.from_json(json.loads(capsys.readouterr().out))


def test_validate(bundle: Bundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "page.html"
    arguments = ["validate", str(bundle.path), "--threads", "1", "--memory-limit", "1GB", "--html", str(page)]
    report = report_of(arguments, capsys)
    assert [check.name for check in report.checks] == [
        "latents: relative L2",
        "frames: largest difference of 8-bit pixels",
    ]
    assert [check.limit for check in report.checks] == [compare.tolerance("logits_fp32"), 1.0]
    (row,) = report.tables[0].rows
    assert row[:4] == ("clip", 7, 2, 1) and row[5] == 5
    assert (
        f"the first 5 of {bundle.manifest['video']['frames']} frames" in report.tables[0].note
        and dict(report.facts)["build"] == bundle.build
    )
    assert "Golden case" in page.read_text(encoding="utf-8")


def test_validate_fails_a_bundle_that_is_not_its_model(
    bundle: Bundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    other = changed_bundle(bundle.path, tmp_path / "o.edgerun", lambda manifest: manifest["video"].update(guidance=3.0))
    report = report_of(["validate", str(other), "--threads", "1"], capsys, status=1)
    assert [check.passed for check in report.checks] == [False, False]
    assert report.checks[0].measured is not None and report.checks[0].measured > 1e-2


def test_validate_has_room_for_a_quantised_bundle(
    bundle: Bundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    def change(manifest: dict) -> None:
        manifest["recipe"]["quantize"] = "int8"

    other = changed_bundle(bundle.path, tmp_path / "o.edgerun", change)
    report = report_of(["validate", str(other), "--threads", "1"], capsys)
    names = ("quantized_parity_logits", "quantized_frames_psnr_db")
    assert [check.limit for check in report.checks] == [compare.tolerance(name) for name in names]


def test_validate_without_a_golden_case(bundle: Bundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    other = changed_bundle(bundle.path, tmp_path / "o.edgerun", lambda manifest: manifest.update(golden=[]))
    assert main(["validate", str(other)]) == 2
    said = capsys.readouterr().err
    assert "has no golden case, so nothing can be checked" in said and said.count("\n") == 1
    assert main(["validate", str(bundle.path), "--memory-limit", "1MB"]) == 2
    assert "host: a memory limit of 1000000 bytes" in capsys.readouterr().err.splitlines()[-1]


def test_bench(bundle: Bundle, capsys: pytest.CaptureFixture) -> None:
    options = ["--threads", "1", "-r", "2", "--lpl", "none", "--tdtm", "1", "--memory-limit", "1GB"]
    report = report_of(["bench", str(bundle.path), *options], capsys)
    facts = dict(report.facts)
    assert facts["evaluations"] == 4 and facts["prefetch"] == 1 and facts["whole run, s"].n == 2
    assert facts["peak RSS, MiB"] > 1
    stages, steps, programs = (table.rows for table in report.tables)
    assert [(row[0], row[6]) for row in stages] == [("encode", 4), ("denoise", 3), ("decode", 2)]
    assert [(row[0], row[1]) for row in steps] == [("first", 1), ("plain", 3)]  # the one that merges is the first
    by_name = {row[1]: row for row in programs}
    calls = -(-bundle.manifest["video"]["frames"] // bundle.manifest["video"]["decoder"]["frames_per_call"])
    assert by_name["denoiser_pairs_0"][4] == 4 and by_name["decoder_frames_0"][4] == calls
    assert sum(row[2] for row in programs if row[0] == "denoise") == stages[1][7]
    assert all(row[3] > 0 for row in programs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "8"], "--prompt-tokens is for text bundles"),
        (["-n", "0"], "--new-tokens is for text bundles"),
        (["--against", "x"], "--against is for text bundles"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "red " * 9], "the limit is 9"),
        (["--lpl", "0"], "--lpl is '0'"),
        (["--device", "toaster"], "there is no device 'toaster'"),
    ],
)
def test_bad_benches_end_in_one_line(
    bundle: Bundle, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["bench", str(bundle.path), *options]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_inspect(bundle: Bundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(bundle.path)]) == 0
    said = capsys.readouterr().out
    clip = f"{bundle.manifest['video']['frames']} frames of 12 x 16"
    for part in (clip, "at most 9 tokens", "LPL after 3, TDTM in 2 steps", "4 steps of euler, guidance 2"):
        assert part in said
    report = report_of(["inspect", str(bundle.path)], capsys)
    chains, programs = report.tables[:2]
    assert [row[:2] for row in chains.rows] == [
        ("text_encoder", 4),
        ("denoiser", 3),
        ("time_decoder", 1),
        ("frame_decoder", 1),
    ]
    files = bundle.manifest["files"]
    sizes = {row[1]: row[2] for row in programs.rows}
    assert sizes["denoiser_pairs_0"] == files["programs/denoiser_pairs_0.pte"]["bytes"] / 2**20
    assert dict(report.facts)["golden case"] == "yes"
    other = changed_bundle(bundle.path, tmp_path / "o.edgerun", lambda manifest: manifest.update(golden=[]))
    assert "nothing to check" in dict(report_of(["inspect", str(other)], capsys).facts)["golden case"]


def test_least_memory_is_the_chain_that_needs_most() -> None:
    def value(name: str, *shape: int | str) -> dict:
        return {"name": name, "dtype": "float32", "shape": list(shape), "limits": {"n": [1, 10]}}

    def program(name: str, planned: int, *values: dict) -> dict:
        sizes = {"planned_bytes": planned, "arena_bytes": 500, "table_bytes": 250}
        return {"name": name, "file": name, "inputs": values[:1], "outputs": values[1:], **sizes}

    manifest = {
        "programs": [
            program("a", 1000, value("x", "n", 5), value("y", 7)),
            program("b", 3000, value("y", 7), value("y", 3)),  # a name that is bound anew
            program("c", 0, value("pictures", "n", 1, 2, 2), value("frames", 3, 2, 4, 5)),
        ],
        "files": {"a": {"bytes": 100}, "b": {"bytes": 90}, "c": {"bytes": 200}},
        "chains": {"denoiser": ["a", "b", "b"], "frame_decoder": ["c"]},
        "video": {"frames": 2, "height": 4, "width": 5},
    }
    assert least_memory_bytes(manifest) == 100 + 250 + 3000 + 500 + 4 * (50 + 7)
    manifest["files"]["c"]["bytes"] = 20_000
    clip, pictures = 3 * 2 * 4 * 5, 2 * 4 * 4
    assert least_memory_bytes(manifest) == 40_000 + 500 + 4 * (10 * 4 + 120) + clip + pictures
