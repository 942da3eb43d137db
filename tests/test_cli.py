"""What the verbs print and return on a tiny bundle: tables, JSON, exit status."""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from edgerun import cli
from edgerun.bundle import Bundle
from edgerun.commands.common import positive_list
from edgerun.report import Report
from tests.shared_bundle import RECIPE, SharedBundle, changed_bundle, shared_bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SharedBundle:
    return shared_bundle(tmp_path_factory, "tiny", RECIPE)


def report_of(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 0) -> Report:
    """The report that a verb prints with --json."""
    assert cli.main([*arguments, "--json"]) == status
    return Report.from_json(json.loads(capsys.readouterr().out))


def test_installed_command_runs_in_a_process_of_its_own(tiny: SharedBundle) -> None:
    command = [
        sys.executable,
        "-m",
        "edgerun.cli",
        "run",
        str(tiny.path),
        "--prompt",
        "ab",
        "--max-new-tokens",
        "3",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = Report.from_json(json.loads(done.stdout))
    assert report.kind == "run" and report.tables[0].rows[0][1] == 3


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([verb, "--help"])
    printed = capsys.readouterr().out
    assert exit_.value.code == 0 and "examples" in printed and f"edgerun {verb}" in printed


def test_stream_prints_what_the_device_gives(tiny: SharedBundle, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["run", str(tiny.path), "--prompt", "the quick brown fox", "--max-new-tokens", "12"]
    assert cli.main(common) == 0
    from_device = capsys.readouterr().out
    assert cli.main([*common, "--stream"]) == 0
    assert capsys.readouterr().out == from_device


def test_prompt_file_is_the_prompt(
    tiny: SharedBundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("häuser\n", encoding="utf-8")
    sampled = ["--max-new-tokens", "5", "--temperature", "0.9", "--seed", "3"]
    from_text = report_of(["run", str(tiny.path), "--prompt", "häuser\n", *sampled], capsys)
    from_file = report_of(["run", str(tiny.path), "--prompt-file", str(tmp_path / "prompt.txt"), *sampled], capsys)
    assert from_text.facts == from_file.facts


def test_run_never_asks_for_more_than_the_context_holds(tiny: SharedBundle, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "x" * (RECIPE.max_context - 8)
    report = report_of(["run", str(tiny.path), "--prompt", prompt, "--max-new-tokens", "500"], capsys)
    prompt_tokens, generated = report.tables[0].rows[0][:2]
    assert prompt_tokens + generated <= RECIPE.max_context


def test_validate_passes_a_good_bundle_and_measures_sparsity(
    tiny: SharedBundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    report = report_of(["validate", str(tiny.path), "--html", str(page)], capsys)
    assert report.checks and report.passed
    density = {row[0]: row[3] for row in report.tables[0].rows}
    assert density["short"] == 100.0 and density["sparse"] < 100.0
    assert page.read_text().startswith("<!doctype html>")


def test_validate_fails_with_status_1_when_the_golden_logits_are_others(
    tiny: SharedBundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = changed_bundle(tiny.path, tmp_path / "model.edgerun", lambda manifest: None)
    entry = Bundle.open(damaged).manifest["golden"][0]["file"]
    case = Bundle.open(damaged).golden_cases()[0]
    noise = np.random.default_rng(0).normal(size=case.logits.shape).astype(np.float32)
    type(case)(case.prompt, case.forced, case.logits + 0.05 * noise).save(damaged / entry)
    fresh = changed_bundle(damaged, tmp_path / "again.edgerun", lambda manifest: _rehash(damaged, manifest, entry))
    report = report_of(["validate", str(fresh)], capsys, status=1)
    assert next(check.name for check in report.checks if not check.passed) == "short: relative L2 of logits"


def _rehash(bundle: pathlib.Path, manifest: dict[str, object], name: str) -> None:
    from edgerun.bundle import sha256_of

    files = manifest["files"]
    assert isinstance(files, dict)
    files[name] = {"bytes": (bundle / name).stat().st_size, "sha256": sha256_of(bundle / name)}


def test_bench_gives_llama_bench_rows_and_a_ratio(tiny: SharedBundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(tiny.path), "--against", str(tiny.path), "-p", "32,64,9999", "-n", "4", "-r", "2"]
    report = report_of(arguments, capsys)
    assert [row[0] for row in report.tables[0].rows] == ["pp32", "tg4@32", "pp64", "tg4@64"]
    assert all(row[3].value > 0 and row[3].n == 2 for row in report.tables[0].rows)
    assert "9999" in report.notes[0]


def test_benchs_ratio_is_of_paired_runs(tiny: SharedBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first bundle takes 1 and 4 s where the second takes 2 and 2: ratios of speed 2 and 0.5, mean 1.25."""
    from edgerun.commands import bench
    from edgerun.commands.measure import Timing

    seconds = iter([9.0, 9.0, 1.0, 2.0, 4.0, 2.0])  # one run of each is not counted; then they take turns

    def run(*_: object, **__: object) -> tuple[Timing, None]:
        taken = next(seconds)
        return Timing(32, 4, taken, taken / 8, 0.0, None, None), None

    monkeypatch.setattr(bench, "generate_on", run)
    rows = bench.bench_bundles([tiny.path, tiny.path], (32,), 4, repeats=2).tables[0].rows
    assert [row[0] for row in rows] == ["pp32", "tg4@32"]
    assert [row[3].value for row in rows] == [1.25, 1.25] and all(row[3].n == 2 for row in rows)
    assert rows[0][1].value == pytest.approx((32 / 1 + 32 / 4) / 2)


def test_bench_generates_as_deep_as_the_context_goes() -> None:
    from edgerun.commands.bench import Workload, workloads_within

    assert workloads_within(256, (128, 256), 16) == [Workload(128, 16), Workload(256, 0), Workload(240, 16)]


def test_inspect_shows_the_recipe(tiny: SharedBundle, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(["inspect", str(tiny.path)], capsys)
    assert ("dhsa.budget", str(RECIPE.dhsa.budget)) in report.tables[0].rows
    assert dict(report.facts)["layers"] == "2 dhsa"


def test_devices_says_that_the_host_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(["devices", "--device", "host"], capsys)
    assert report.tables[0].rows[0][:2] == ("host", True)


def test_devices_fails_for_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    report_of(["devices", "--device", "toaster"], capsys, status=1)


def test_dry_run_prints_the_plan_and_writes_nothing(
    tiny: SharedBundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.edgerun"
    report = report_of(
        ["export", str(tiny.checkpoint), "-o", str(out), "--dry-run", "--max-context", "256", "--prefill-slice", "64"],
        capsys,
    )
    sizes = dict(report.tables[0].rows)
    assert sizes["peak of the process"] >= sizes["weights, as the runtime packs them"] > 0
    assert list(tmp_path.iterdir()) == []


def test_export_finds_the_bundle_that_is_there(tiny: SharedBundle, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tiny.path / "manifest.json").stat().st_mtime_ns
    dhsa = ["--budget", str(RECIPE.dhsa.budget), "--tile", str(RECIPE.dhsa.tile)]
    size = ["--max-context", "256", "--prefill-slice", "64"]
    assert cli.main(["export", str(tiny.checkpoint), "-o", str(tiny.path), *dhsa, *size]) == 0
    assert (tiny.path / "manifest.json").stat().st_mtime_ns == before


def test_lists_of_numbers_may_be_doublings() -> None:
    assert positive_list("512..8192") == (512, 1024, 2048, 4096, 8192)
    assert positive_list("1,3..13,7") == (1, 3, 6, 12, 7)
    with pytest.raises(argparse.ArgumentTypeError, match=r"write 100\.\.512"):
        positive_list("512..100")
