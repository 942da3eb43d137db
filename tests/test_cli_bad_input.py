"""Bad input: one clear line on stderr, status 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from edgerun import _library, cli
from edgerun.bundle import SCHEMA_VERSION
from tests.models.tiny_checkpoints import save_tiny_checkpoint
from tests.shared_bundle import RECIPE, SharedBundle, changed_bundle, shared_bundle

SIZE = ("--max-context", "256", "--prefill-slice", "64", "--budget", "112", "--tile", "16")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SharedBundle:
    return shared_bundle(tmp_path_factory, "tiny", RECIPE)


@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> pathlib.Path:
    return save_tiny_checkpoint(tmp_path / "checkpoint", "llama3")


@pytest.fixture
def out(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "model.edgerun"


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a verb prints when it refuses; progress lines may come before it."""
    capsys.readouterr()
    try:
        status = cli.main(arguments)
    except SystemExit as exit_:
        status = exit_.code
    errors = capsys.readouterr().err.splitlines()
    assert status == 2
    assert not any("Traceback" in line for line in errors)
    return one_line(errors)


def one_line(errors: list[str]) -> str:
    """The last line on stderr, which names the verb and is of a length that can be read."""
    said = [line for line in errors if line.startswith("edgerun ")]
    assert len(said) == 1 and said[0] == errors[-1] and len(said[0]) < 500, errors
    return said[0]


def export(checkpoint: pathlib.Path, out: pathlib.Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The refusal of an export, after which nothing is where the bundle would have been."""
    line = refusal(["export", str(checkpoint), "-o", str(out), *SIZE, *more], capsys)
    assert list(out.parent.iterdir()) == []
    return line


def edit_config(checkpoint: pathlib.Path, **changes: object) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_safetensors(checkpoint: pathlib.Path, out: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors" in export(checkpoint, out, capsys)


def test_truncated_safetensors(checkpoint: pathlib.Path, out: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in export(checkpoint, out, capsys)


def test_tensor_of_the_wrong_shape(
    checkpoint: pathlib.Path, out: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = checkpoint / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    name = "model.layers.0.self_attn.q_proj.weight"
    rows, columns = tensors[name].shape
    safetensors.torch.save_file({**tensors, name: torch.zeros(rows + 1, columns)}, weights)
    line = export(checkpoint, out, capsys)
    assert name in line and str(rows + 1) in line and str(rows) in line


def test_checkpoint_that_is_not_there(
    tmp_path: pathlib.Path, out: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere" in export(tmp_path / "nowhere", out, capsys)


def test_encoder_only_model(checkpoint: pathlib.Path, out: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(checkpoint, model_type="bert", architectures=["BertForMaskedLM"])
    assert "bert" in export(checkpoint, out, capsys).lower()


def test_unknown_rope_type(checkpoint: pathlib.Path, out: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(checkpoint, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})
    assert "spiral" in export(checkpoint, out, capsys)


def test_budget_below_its_minimum(
    checkpoint: pathlib.Path, out: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = export(checkpoint, out, capsys, "--budget", "100")
    assert "100" in line and "108" in line  # sink 16 + local 76 + tile 16


def test_max_context_above_the_models(
    checkpoint: pathlib.Path, out: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = export(checkpoint, out, capsys, "--max-context", "4096")
    assert "4096" in line and "512" in line


def test_unknown_option_value(checkpoint: pathlib.Path, out: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--quantize" in export(checkpoint, out, capsys, "--quantize", "int3")


def test_memory_limit_says_what_would_fit(
    checkpoint: pathlib.Path, out: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = export(checkpoint, out, capsys, "--memory-limit", "1MiB")
    assert "memory" in line.lower()


def test_target_that_is_no_bundle(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    line = refusal(["export", str(checkpoint), "-o", str(mine), *SIZE, "--overwrite"], capsys)
    assert "mine" in line and (mine / "thesis.txt").read_text() == "years of work"


def test_prompt_longer_than_the_context(tiny: SharedBundle, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(["run", str(tiny.path), "--prompt", "x" * 300], capsys)
    assert "30" in line and "256" in line


def test_empty_prompt(tiny: SharedBundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert "empty" in refusal(["run", str(tiny.path), "--prompt", ""], capsys)


def test_prompt_file_that_is_not_there(tiny: SharedBundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.txt" in refusal(["run", str(tiny.path), "--prompt-file", "nowhere.txt"], capsys)


@pytest.mark.parametrize(
    "verb", [["run", "--prompt", "ab"], ["validate"], ["inspect"], ["bench", "-p", "8", "-n", "0"]]
)
def test_flipped_bytes_in_a_program(
    verb: list[str], tiny: SharedBundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "model.edgerun"
    shutil.copytree(tiny.path, damaged)
    program = damaged / "programs" / "text.pte"
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 0xFF
    program.write_bytes(content)
    line = refusal([verb[0], str(damaged), *verb[1:]], capsys)
    assert "text.pte" in line and "sha256" in line


def test_manifest_path_that_leaves_the_folder(
    tiny: SharedBundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def escape(manifest: dict[str, object]) -> None:
        files = manifest["files"]
        assert isinstance(files, dict)
        files["../secret"] = {"bytes": 1, "sha256": "0" * 64}

    bad = changed_bundle(tiny.path, tmp_path / "model.edgerun", escape)
    assert "../secret" in refusal(["inspect", str(bad)], capsys)


def test_future_schema_version(tiny: SharedBundle, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    future = changed_bundle(
        tiny.path, tmp_path / "model.edgerun", lambda m: m.update(schema_version=SCHEMA_VERSION + 1)
    )
    line = refusal(["validate", str(future)], capsys)
    assert f"version {SCHEMA_VERSION + 1}" in line and "update" in line


def test_folder_that_is_no_bundle(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "manifest.json" in refusal(["inspect", str(tmp_path)], capsys)


def test_missing_op_library(
    tiny: SharedBundle, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_library, "native_folder", lambda: tmp_path)
    assert "build it with" in refusal(["run", str(tiny.path), "--prompt", "ab"], capsys)


def test_unknown_device(tiny: SharedBundle, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(["run", str(tiny.path), "--prompt", "ab", "--device", "toaster"], capsys)
    assert "toaster" in line and "emulated-arm64" in line


def test_unknown_task(tiny: SharedBundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert "niah_single_1" in refusal(["eval", str(tiny.path), "ruler", "--tasks", "chess"], capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "512"], "exported for"),
        (["--checkpoint", "zoo:text"], "--checkpoint"),
        (["--selectors", "window-sink"], "--selectors"),
        (["--tasks", "depth_abc"], "depth_50"),
    ],
)
def test_eval_option_that_would_change_nothing(
    options: list[str], said: str, tiny: SharedBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(["eval", str(tiny.path), "needle", *options], capsys)


def test_debug_shows_where_an_error_came_from(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "edgerun.cli", "inspect", str(tmp_path), "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and "BundleError" in done.stderr


def export_process(checkpoint: pathlib.Path, out: pathlib.Path, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "edgerun.cli", "export", str(checkpoint), "-o", str(out), *SIZE]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_full_disk(checkpoint: pathlib.Path, out: pathlib.Path) -> None:
    def no_room() -> None:  # a write beyond the limit fails like one beyond the disk's end
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    process = export_process(checkpoint, out, preexec_fn=no_room)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "make room" in one_line(errors.splitlines())
    assert list(out.parent.iterdir()) == []


def test_read_only_target(checkpoint: pathlib.Path, out: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() == 0:  # root may write to a folder that is read-only, but not make one in /sys
        target = pathlib.Path("/sys/model.edgerun")
    else:
        out.parent.chmod(0o555)
        target = out
    line = refusal(["export", str(checkpoint), "-o", str(target), *SIZE], capsys)
    assert str(target) in line and "choose another target" in line and not target.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_export(number: signal.Signals, checkpoint: pathlib.Path, out: pathlib.Path) -> None:
    process = export_process(checkpoint, out)
    assert process.stderr is not None
    for line in process.stderr:
        if "lower to ExecuTorch" in line:
            break
    assert [path.name.startswith(".model.edgerun.") for path in out.parent.iterdir()] == [True]
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert ("interrupted" in errors) == (number == signal.SIGINT)
    assert list(out.parent.iterdir()) == []
