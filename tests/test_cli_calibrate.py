"""`edgerun calibrate`, and what export and eval do with its file, on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import pytest

from edgerun import cli
from edgerun.bundle import Bundle
from edgerun.calibration import Calibration
from edgerun.evaluation import calibrate as module
from edgerun.report import Report
from tests.evaluation.test_calibrate import prose
from tests.models.tiny_checkpoints import save_tiny_checkpoint

SHORT = ("--lengths", "256", "--samples", "3", "--prefill-slice", "64")
MADE = ("--budgets", "112", "--tile", "16", "--decode-tokens", "16", "--skip-predictor")  # not with --check
FEW = (*SHORT, *MADE)
SIZE = ("--max-context", "256", "--prefill-slice", "64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint, a text, and a calibration of both."""
    folder = tmp_path_factory.mktemp("calibrated")
    save_tiny_checkpoint(folder / "checkpoint")
    (folder / "text.txt").write_text(prose(0))
    (folder / "other.txt").write_text(prose(7))
    assert calibrate(folder, "--max-kl", "0.5", "-o", str(folder / "a.calibration")) == 0
    return folder


def calibrate(folder: pathlib.Path, *more: str, text: str = "text.txt") -> int:
    what = SHORT if "--check" in more else FEW
    return cli.main(["calibrate", str(folder / "checkpoint"), "--text", str(folder / text), *what, *more])


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The one line that a verb prints when it refuses."""
    capsys.readouterr()
    assert cli.main(arguments) == status
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("edgerun ")]
    assert len(said) == 1 and len(said[0]) < 500
    return said[0]


def test_report_has_the_choice_and_what_it_reached(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(folder / "a.calibration.jsonl", tmp_path / "b.calibration.jsonl")
    page = tmp_path / "report.html"
    arguments = ("--max-kl", "0.5", "-o", str(tmp_path / "b.calibration"), "--json", "--html", str(page))
    capsys.readouterr()
    assert calibrate(folder, *arguments) == 0
    report = Report.from_json(json.loads(capsys.readouterr().out))
    assert report.passed and len(report.checks) == 1 and report.checks[0].limit == 0.5
    assert page.read_text().startswith("<!doctype html>")
    made = Calibration.open(tmp_path / "b.calibration")
    assert dict(report.facts)["layers"] == "; ".join(choice.name for choice in made.dhsa.layers)
    assert (tmp_path / "b.calibration").read_bytes() == (folder / "a.calibration").read_bytes()


def test_a_target_that_nothing_keeps_ends_with_status_1_and_no_file(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copyfile(folder / "a.calibration.jsonl", tmp_path / "b.calibration.jsonl")
    text = ["--text", str(folder / "text.txt")]
    arguments = ["calibrate", str(folder / "checkpoint"), *text, *FEW, "--max-kl", "1e-6"]
    line = refusal([*arguments, "-o", str(tmp_path / "b.calibration")], capsys, status=1)
    assert "no sparse choice keeps a KL of 1e-06 nats" in line and "--attention dense, which is trivially" in line
    assert [path.name for path in tmp_path.iterdir()] == ["b.calibration.jsonl"]


def test_a_choice_that_misses_the_proof_ends_with_status_1_and_no_file(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(folder / "a.calibration.jsonl", tmp_path / "b.calibration.jsonl")
    original = module._Chooser.achieved
    monkeypatch.setattr(
        module._Chooser,
        "achieved",
        lambda self, proposal, windows: tuple(
            dataclasses.replace(one, high=0.75 if windows is self._text.proof else one.high)
            for one in original(self, proposal, windows)
        ),
    )
    arguments = ["calibrate", str(folder / "checkpoint"), "--text", str(folder / "text.txt"), *FEW, "--max-kl", "0.5"]
    line = refusal([*arguments, "-o", str(tmp_path / "b.calibration")], capsys, status=1)
    assert "misses the target of 0.5 nats on proof text" in line and "up to 0.75, 3 texts at 256 tokens" in line
    assert [path.name for path in tmp_path.iterdir()] == ["b.calibration.jsonl"]


def test_check_measures_other_text(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    check = ("--check", str(folder / "a.calibration"), "--json", "--seed", "5")
    assert calibrate(folder, *check, text="other.txt") == 0
    report = Report.from_json(json.loads(capsys.readouterr().out))
    assert report.tables[0].rows[0][:2] == (256, 9) and report.checks[0].limit == 0.5
    assert calibrate(folder, *check, "--max-kl", "1e-6", text="other.txt") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "pass -o FILE.calibration to make a calibration, or --check"),
        (("-o", "{folder}/a.calibration"), "a.calibration is there: pass --overwrite"),
        (("-o", "{folder}/checkpoint", "--overwrite"), "checkpoint is a folder: pass -o the name of a file"),
        (("-o", "{folder}/nowhere/a.calibration"), "does not exist"),
        (("-o", "{folder}/b", "--samples", "50"), "windows of 256 tokens, 150 are needed"),
        (("-o", "{folder}/b", "--samples", "1"), "at least 2"),
        (("-o", "{folder}/b", "--max-kl", "0"), "above 0"),
        (("-o", "{folder}/b", "--budgets", "64"), "below its minimum of 108"),
        (("-o", "{folder}/b", "--budgets", "256"), "nothing would be sparse"),
        (("-o", "{folder}/b", "--lengths", "1024"), "max_context is 1024 tokens"),
        (("--check", "{folder}/text.txt"), "no calibration"),
        (("--check", "{folder}/a.calibration", "--samples", "1"), "at least 2"),
        (("--check", "{folder}/a.calibration", "--budgets", "112"), "--budgets is given beside --check"),
        (("--check", "{folder}/a.calibration", "--tile", "16"), "--tile is given beside --check"),
        (("--check", "{folder}/a.calibration", "--decode-tokens", "16"), "--decode-tokens is given beside --check"),
        (("--check", "{folder}/a.calibration", "--skip-predictor"), "--skip-predictor is given beside --check"),
        (("--check", "{folder}/a.calibration", "--overwrite"), "--overwrite is given beside --check"),
    ],
)
def test_bad_input_is_refused(
    more: tuple[str, ...], message: str, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    given = [one.format(folder=folder) for one in more]
    text = prose(0, 12000) if "1024" in more else prose(0)
    (folder / "long.txt").write_text(text)
    what = SHORT if "--check" in more else FEW
    line = refusal(["calibrate", str(folder / "checkpoint"), "--text", str(folder / "long.txt"), *what, *given], capsys)
    (folder / "long.txt").unlink()
    assert message in line
    assert sorted(path.name for path in folder.iterdir()) == before


def test_export_takes_the_choices_and_the_manifest_says_whose(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Calibration.open(folder / "a.calibration")
    out = tmp_path / "model.edgerun"
    command = ["export", str(folder / "checkpoint"), *SIZE, "-o", str(out)]
    assert cli.main([*command, "--calibration", str(folder / "a.calibration")]) == 0
    bundle = Bundle.open(out)
    assert bundle.recipe.dhsa == made.dhsa and bundle.recipe.attention == "dhsa"
    entry = bundle.manifest["calibration"]
    assert (entry["sha256"], entry["max_kl_nats"]) == (made.sha256, 0.5)
    assert bundle.manifest["parity"]["sparse"]["mean_kl_nats"] < 1e-3
    capsys.readouterr()
    assert cli.main(["inspect", str(out)]) == 0
    printed = capsys.readouterr().out
    assert made.sha256[:16] in printed and all(choice.name in printed for choice in made.dhsa.layers)
    # The same build of another calibration is another bundle: its manifest would say the wrong file.
    shutil.copyfile(folder / "a.calibration", tmp_path / "c.calibration")
    changed = made.save(tmp_path / "c.calibration")
    assert changed.sha256 == made.sha256  # the same content
    assert cli.main([*command, "--calibration", str(tmp_path / "c.calibration")]) == 0
    wider = made.__class__(**{**vars(made), "max_kl_nats": 0.6}).save(tmp_path / "d.calibration")
    assert wider.sha256 != made.sha256
    assert "another build" in refusal([*command, "--calibration", str(tmp_path / "d.calibration")], capsys)


@pytest.mark.parametrize(
    "option", [("--budget", "2048"), ("--selector", "chunk"), ("--tile", "16"), ("--attention", "dhsa")]
)
def test_options_that_a_calibration_decides_are_refused_beside_it(
    option: tuple[str, str], folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(folder / "checkpoint"), *SIZE, "-o", str(tmp_path / "model.edgerun")]
    line = refusal([*command, "--calibration", str(folder / "a.calibration"), *option], capsys)
    assert f"{option[0]} is given beside --calibration" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["export", "export --dry-run", "eval"])
def test_a_calibration_of_another_model_is_refused(
    verb: str, folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny_checkpoint(tmp_path / "other", seed=1)
    out = tmp_path / "model.edgerun"
    verb, *dry = verb.split()
    rest = ["-o", str(out), *SIZE, *dry] if verb == "export" else ["ruler", "--lengths", "512"]
    line = refusal([verb, str(other), *rest, "--calibration", str(folder / "a.calibration")], capsys)
    assert Calibration.open(folder / "a.calibration").checkpoint_sha256[:16] in line
    assert "calibrate this checkpoint" in line and not out.exists()


def test_dry_run_plans_with_the_choices(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    command = ["export", str(folder / "checkpoint"), *SIZE, "--dry-run"]
    assert cli.main([*command, "--calibration", str(folder / "a.calibration"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tables"]


def test_eval_asks_the_calibrated_model(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    what = ["ruler", "--tasks", "niah_single_1", "--lengths", "512", "--samples", "1", "--processes", "1"]
    command = ["eval", str(folder / "checkpoint"), *what, "--calibration", str(folder / "a.calibration"), "--json"]
    assert cli.main([*command, "--against", "dense"]) == 0
    report = Report.from_json(json.loads(capsys.readouterr().out))
    assert [row[2] for row in report.tables[0].rows] == ["dense", "calibrated"]
    density = report.tables[0].columns.index(next(c for c in report.tables[0].columns if c.name == "density"))
    assert report.tables[0].rows[0][density] == 100.0 > report.tables[0].rows[1][density]
    assert "--budgets and --calibration exclude each other" in refusal([*command, "--budgets", "256"], capsys)
