"""The host and emulated arm64: what they say, what they compute, and what they say when something is missing."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import subprocess
from typing import Literal

import numpy as np
import pytest

from edgerun import compare
from edgerun._library import runner_path
from edgerun.bundle import Bundle
from edgerun.devices import RunRequest, emulated_arm64, host, list_devices, open_device
from edgerun.errors import DeviceError, EdgerunError
from edgerun.recipe import Recipe
from edgerun.sessions.text import TextSession
from tests.shared_bundle import changed_bundle, shared_bundle

REQUEST = RunRequest(tuple(np.random.default_rng(0).integers(0, 256, 150).tolist()), 12, stop_ids=(), threads=1)


def test_host_runs_as_the_session_does(bundle: pathlib.Path) -> None:
    report = open_device("host").run(bundle, REQUEST)
    generation = TextSession(bundle).generate(REQUEST.prompt, max_new_tokens=12, stop_ids=[])
    assert report.tokens == generation.tokens
    assert report.values["attended_pairs"] == generation.stats.attended_pairs
    assert report.values["build"] == Bundle.open(bundle).build
    assert report.values["device"]["threads"] == 1


def test_forced_tokens_give_their_logits(bundle: pathlib.Path) -> None:
    forced = (9, 8, 7)
    report = open_device("host").run(bundle, dataclasses.replace(REQUEST, forced=forced))
    session = TextSession(bundle)
    expected = [session.forward(REQUEST.prompt, 0)]
    expected += [session.forward([token], 150 + offset) for offset, token in enumerate(forced)]
    assert report.logits is not None
    assert (report.logits == np.stack(expected)).all()
    alone = open_device("host").run(bundle, dataclasses.replace(REQUEST, forced=()))
    assert alone.logits is not None
    assert (alone.logits == expected[0]).all()


def test_arm64_gives_the_same_tokens(arm64: emulated_arm64.EmulatedArm64Device, bundle: pathlib.Path) -> None:
    there, here = (device.run(bundle, REQUEST) for device in (arm64, open_device("host")))
    assert there.values["device"]["machine"] == "aarch64"
    assert there.tokens == here.tokens
    assert there.values["causal_pairs"] == here.values["causal_pairs"]


@pytest.mark.parametrize("quantize", ["int8", "8da4w"])
def test_quantised_products_hold_on_arm64(
    arm64: emulated_arm64.EmulatedArm64Device,
    quantize: Literal["int8", "8da4w"],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """XNNPACK takes other kernels there, by the core: with 8-bit products, dot products and matrix products."""
    recipe = Recipe(attention="dense", max_context=64, prefill_slice=32, quantize=quantize)
    bundle = shared_bundle(tmp_path_factory, quantize, recipe).path
    request = RunRequest(tuple(np.random.default_rng(1).integers(0, 256, 40).tolist()), 4, forced=(3, 4), threads=1)
    expected = open_device("host").run(bundle, request).logits
    for cpu in ("cortex-a53", "neoverse-n1", arm64.cpu):
        found = emulated_arm64.EmulatedArm64Device(cpu=cpu).run(bundle, request).logits
        assert found is not None and expected is not None
        assert compare.relative_l2(found, expected) <= compare.tolerance("quantized_parity_logits"), cpu


@pytest.mark.parametrize(
    ("said", "cpu"),
    [
        ("qemu-aarch64 version 6.2.0 (Debian 1:6.2+dfsg-2ubuntu6)", "max"),
        ("qemu-aarch64 version 7.2.22 (Debian 1:7.2+dfsg-7)", "max,sme=off"),
        ("qemu-aarch64 version 10.0.2", "max,sme=off"),
        ("qemu-aarch64 of another kind", "max,sme=off"),
    ],
)
def test_the_emulator_leaves_sme_out(monkeypatch: pytest.MonkeyPatch, said: str, cpu: str) -> None:
    monkeypatch.setattr(emulated_arm64, "run_command", lambda *_, **__: said)
    assert emulated_arm64.most_capable_cpu.__wrapped__() == cpu


def test_an_emulator_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    broken = tmp_path / "qemu-aarch64"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(DeviceError, match="qemu-aarch64 --version fails: apt install --reinstall qemu-user"):
        emulated_arm64.most_capable_cpu.__wrapped__()


def test_arm64_gives_the_same_logits(arm64: emulated_arm64.EmulatedArm64Device, bundle: pathlib.Path) -> None:
    request = dataclasses.replace(REQUEST, prompt=REQUEST.prompt[:90], forced=(3, 4))  # within the budget
    there, here = (device.run(bundle, request).logits for device in (arm64, open_device("host")))
    assert there is not None and here is not None
    assert compare.relative_l2(there, here) <= compare.tolerance("logits_fp32")


def test_arm64_samples_the_same_tokens(arm64: emulated_arm64.EmulatedArm64Device, bundle: pathlib.Path) -> None:
    request = dataclasses.replace(REQUEST, prompt=REQUEST.prompt[:20], temperature=1.2, top_k=50, top_p=0.9, seed=5)
    assert arm64.run(bundle, request).tokens == open_device("host").run(bundle, request).tokens


def test_arm64_core_without_extensions(arm64: emulated_arm64.EmulatedArm64Device, bundle: pathlib.Path) -> None:
    oldest = emulated_arm64.EmulatedArm64Device(cpu="cortex-a53")
    assert oldest.describe()["features"] == []
    short = dataclasses.replace(REQUEST, prompt=REQUEST.prompt[:40], max_new_tokens=4)
    assert oldest.run(bundle, short).tokens == open_device("host").run(bundle, short).tokens


def test_no_arm64_build(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("qemu-aarch64 is not installed: apt install qemu-user")
    monkeypatch.setenv(emulated_arm64.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(DeviceError, match=r"there is no arm64 build at .*: run `make arm64`"):
        open_device("emulated-arm64").describe()


def test_no_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    state = list_devices(("emulated-arm64",))[0]
    assert (state.facts, state.missing) == (
        None,
        "emulated-arm64: qemu-aarch64 is not installed: apt install qemu-user",
    )


def test_no_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> pathlib.Path:
        raise EdgerunError("bin/edgerun-runner is not there: build it")

    monkeypatch.setattr(host, "runner_path", missing)
    assert list_devices(("host",))[0].missing == "host: bin/edgerun-runner is not there: build it"


def test_devices_that_are_none() -> None:
    with pytest.raises(DeviceError, match="there is no device 'toaster'"):
        open_device("toaster")


def run_runner(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([runner_path(), *map(str, arguments)], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no bundle given"),
        (["{bundle}"], "no prompt given"),
        (["{bundle}", "--tokens"], "--tokens needs a value"),
        (["{bundle}", "--tokens", "1,x"], "--tokens is 'x'; it must be a number"),
        (["{bundle}", "--tokens-file", "/nowhere"], "/nowhere cannot be read: No such file"),
        (["{bundle}", "--tokens", ""], "the prompt has 0 tokens"),
        (["{bundle}", "--tokens", "1", "--turbo", "9"], "unknown option --turbo"),
        (["{bundle}", "--tokens", "1", "--temperature", "-1"], "temperature is -1"),
        (["{bundle}", "--tokens", "1", "--threads", "1000"], "threads is 1000; it must be 1 to 256"),
        (["{bundle}", "--tokens", "1", "--report", "/nowhere/report.json"], "/nowhere/report.json cannot be written"),
        (["/nowhere", "--tokens", "1"], "'/nowhere' is not a bundle folder"),
        (["{bundle}", "{bundle}", "--tokens", "1"], "two bundles"),
    ],
)
def test_runner_refuses_in_one_line(bundle: pathlib.Path, arguments: list[str], said: str) -> None:
    done = run_runner(*(argument.format(bundle=bundle) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_runner_refuses_a_damaged_bundle_in_one_line(bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    damaged = changed_bundle(bundle, tmp_path / "bad.edgerun", lambda manifest: manifest.update(build="0" * 64))
    done = run_runner(damaged, "--tokens", "1")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_runner_needs_no_python() -> None:
    linked = subprocess.run(["ldd", runner_path()], capture_output=True, text=True, check=True).stdout
    assert "libexecutorch.so" in linked
    assert "python" not in linked.replace(os.path.realpath(runner_path().parents[3]), "")
    assert run_runner("--version").stdout.startswith("edgerun-runner 0.")
    assert "--tokens-file" in run_runner("--help").stdout


def test_a_full_disk_leaves_no_report(bundle: pathlib.Path) -> None:
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pathlib.Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [runner_path(), bundle, "--tokens", "1,2", "--max-new-tokens", "1"], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert b"cannot be written" in done.stderr
