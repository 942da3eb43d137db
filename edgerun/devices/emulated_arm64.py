"""arm64 Linux without a board: the cross-built runner in qemu's user emulation.

The same program that goes to a board computes here, XNNPACK and our kernels included; numbers are real, times are not.
SME is left out with every version of qemu, so that results do not depend on it: 7.2 sums the 8-bit outer products
(SMOPA) wrong that XNNPACK takes for int8 weights.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
import shutil

from edgerun.devices.runner import Report, Request, describe_locally, run_command, run_locally
from edgerun.errors import DeviceError

FOLDER_VARIABLE = "EDGERUN_ARM64_DIR"
_EMULATOR = "qemu-aarch64"
_FIRST_WITH_SME = (7, 1)  # earlier ones do not know the option that turns it off
_SYSTEM_ROOT = pathlib.Path("/usr/aarch64-linux-gnu")


@dataclasses.dataclass(frozen=True)
class EmulatedArm64Device:
    """qemu-aarch64 on this machine. `cpu` is qemu's name of a core, None its most capable without SME."""

    name: str = "emulated-arm64"
    cpu: str | None = None

    def describe(self) -> dict[str, object]:
        """What programs see there. Raises DeviceError when the emulator or the arm64 build is missing."""
        facts = describe_locally(self._command(), self.name)
        return {**facts, "cpu": f"qemu {self.cpu or most_capable_cpu()} on {facts['cpu'] or 'this machine'}"}

    def run(self, bundle: pathlib.Path, request: Request[Report]) -> Report:
        """Run `request` in the emulator. Raises DeviceError."""
        return run_locally(self._command(), pathlib.Path(bundle), request, self.name)

    def _command(self) -> list[str]:
        if shutil.which(_EMULATOR) is None:
            raise DeviceError(f"{self.name}: {_EMULATOR} is not installed: apt install qemu-user")
        if not (_SYSTEM_ROOT / "lib").is_dir():
            raise DeviceError(f"{self.name}: {_SYSTEM_ROOT} is missing: apt install g++-aarch64-linux-gnu")
        return [_EMULATOR, "-L", str(_SYSTEM_ROOT), "-cpu", self.cpu or most_capable_cpu(), str(arm64_runner())]


@functools.cache
def most_capable_cpu() -> str:
    """qemu's name of the core with all that it emulates, but for SME. Raises DeviceError when qemu does not start."""
    try:
        said = run_command([_EMULATOR, "--version"], "emulated-arm64", timeout_s=60.0)
    except DeviceError:
        raise DeviceError(f"emulated-arm64: {_EMULATOR} --version fails: apt install --reinstall qemu-user") from None
    version = re.search(r"version (\d+)\.(\d+)", said)
    has_sme = version is None or tuple(map(int, version.groups())) >= _FIRST_WITH_SME
    return "max,sme=off" if has_sme else "max"


def arm64_folder() -> pathlib.Path:
    """Where the arm64 build is looked for: $EDGERUN_ARM64_DIR, else build-arm64 of the source tree."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return pathlib.Path(chosen) if chosen else pathlib.Path(__file__).resolve().parents[2] / "build-arm64"


def arm64_runner() -> pathlib.Path:
    """The runner built for arm64 Linux. Raises DeviceError when there is none."""
    runner = arm64_folder() / "edgerun" / "bin" / "edgerun-runner"
    if not runner.is_file():
        raise DeviceError(
            f"there is no arm64 build at {arm64_folder()}: run `make arm64` in the source tree, "
            f"or set {FOLDER_VARIABLE} to a folder that it made"
        )
    return runner
