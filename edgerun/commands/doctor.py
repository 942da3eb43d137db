"""Say what is here, what is missing and how to get it: versions, the native library, the runner, devices.

Exit status 1 when something that every bundle needs is missing.

examples
  edgerun doctor
  edgerun doctor --json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Callable

from edgerun.commands.common import CHECK_FAILED, GOOD, Tools, add_output_options, begin_report, emit
from edgerun.errors import EdgerunError
from edgerun.report import Cell, Column, Report, Table

SUMMARY = "is everything there, and how to get what is not"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked for. needed: without it no bundle runs here."""

    name: str
    found: bool
    needed: bool
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun doctor`."""
    add_output_options(parser, html=False)


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """`edgerun doctor`."""
    findings = examine()
    emit(_report(findings, tools.command), arguments)
    return CHECK_FAILED if any(finding.needed and not finding.found for finding in findings) else GOOD


def examine() -> tuple[Finding, ...]:
    """Look for everything that edgerun uses; never raises."""
    findings = [_package(requirement, extra) for requirement, extra in _requirements()]
    findings += [_try("op library", _op_library), _try("runner", _runner), _try("attention op", _attention_op)]
    findings += [
        _program("aarch64-linux-gnu-g++", "builds for arm64", "apt-get install g++-aarch64-linux-gnu"),
        _program("qemu-aarch64", "runs arm64 programs", "apt-get install qemu-user"),
        _program("ssh", "reaches boards", "apt-get install openssh-client"),
    ]
    return tuple(findings)


def _report(findings: tuple[Finding, ...], command: str) -> Report:
    report = begin_report("doctor", "edgerun doctor", command)
    machine = report.machine
    memory = None if machine.memory_bytes is None else f"{machine.memory_bytes / 2**30:.1f} GiB"
    facts: list[tuple[str, Cell]] = [
        ("edgerun", report.edgerun_version),
        ("system", f"{machine.system} {machine.machine}, python {machine.versions['python']}"),
        ("cpu", machine.cpu),
        ("features", ", ".join(machine.features) or "none that kernels use"),
        ("cores", machine.cores),
        ("memory", memory),
    ]
    state = {(True, True): "ok", (True, False): "ok", (False, True): "MISSING", (False, False): "not there"}
    rows = tuple((f.name, state[f.found, f.needed], "all" if f.needed else "some", f.detail) for f in findings)
    table = Table("", (Column("what"), Column("state"), Column("needed for"), Column("detail")), rows)
    return dataclasses.replace(report, facts=tuple(facts), tables=(table,))


def _requirements() -> list[tuple[str, str]]:
    """(requirement, extra or "") of the installed package; only what running and exporting need."""
    lines = importlib.metadata.requires("edgerun") or []
    parsed = [(line.split(";")[0].strip(), re.search(r"extra == ['\"](\w+)['\"]", line)) for line in lines]
    return [(line, extra[1] if extra else "") for line, extra in parsed if extra is None or extra[1] == "export"]


def _package(requirement: str, extra: str) -> Finding:
    name = re.split(r"[<>=!~\[ ]", requirement, maxsplit=1)[0]
    install = f"pip install '{requirement}'" if not extra else f"pip install 'edgerun[{extra}]'"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, False, not extra, install)
    exact = re.search(r"==([\w.]+)", requirement)
    if exact and version.split("+")[0] != exact[1]:
        return Finding(name, False, not extra, f"{version}, but {exact[1]} is needed: {install}")
    return Finding(name, True, not extra, version)


def _try(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, True, look())
    except (EdgerunError, OSError, ImportError, RuntimeError) as error:
        return Finding(name, False, True, " ".join(str(error).split()))


def _program(name: str, use: str, install: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, path is not None, False, f"{use}: {path}" if path else f"{use}; {install}")


def _op_library() -> str:
    """Load it as ExecuTorch's own runners would."""
    from edgerun._library import load_op_library

    return str(load_op_library())


def _runner() -> str:
    """Start it, which loads the runtime and every library below it."""
    from edgerun._library import runner_path

    path = runner_path()
    result = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=60)
    if result.returncode != 0:
        raise RuntimeError(f"{path} does not start: {result.stderr.strip()[:300]}")
    return f"{result.stdout.strip()}, {path}"


def _attention_op() -> str:
    """Run the op once through torch on four tokens."""
    import torch

    from edgerun.ops import dhsa_attention as op

    options = op.AttentionOptions(scale=1.0)
    state = op.AttentionState.allocate(1, 16, 16, options, torch.float32)
    ones = torch.ones(1, 1, 4, 16)
    out = op.attend(ones, ones, ones, state, torch.tensor([0]), options)
    if not torch.allclose(out, torch.ones_like(out)):
        raise RuntimeError(
            "the attention op gives wrong numbers: build again with `pip install --no-build-isolation -e .`"
        )
    return "runs and gives the right numbers"
