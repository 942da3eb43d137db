"""What holds for every test: one thread a worker, no network, none hangs, the smoke test first, no quiet skip in CI."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

# Before torch is imported: the test workers share the cores, so each takes one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

from tests.watchdog import pytest_runtest_protocol as pytest_runtest_protocol  # a hook

if TYPE_CHECKING:
    from edgerun.devices.emulated_arm64 import EmulatedArm64Device

# A skip for one of these is the machine's fault; in CI it is a failure. `make packages` installs them.
DEBIAN_PACKAGES = ("g++-aarch64-linux-gnu", "qemu-user", "openssh-server", "chromium")
FIRST = "test_tiny.py"

# A shared machine is slow at times: an example may take long, and is the same on every run.
hypothesis.settings.register_profile("edgerun", deadline=None, derandomize=True, print_blob=False)
hypothesis.settings.load_profile("edgerun")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != FIRST)


def in_ci() -> bool:
    """Whether CI=true is set: then a test that a missing Debian package would skip fails instead."""
    return os.environ.get("CI", "").lower() in ("1", "true")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    report = yield
    if in_ci() and report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2])
        if any(package in reason for package in DEBIAN_PACKAGES):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: {reason} (in CI a missing package is a failure: run `make packages`)"
    return report


@pytest.fixture(scope="session")
def arm64() -> EmulatedArm64Device:
    """The emulated device; without what it needs from the system, the test is skipped."""
    from edgerun.devices.emulated_arm64 import EmulatedArm64Device
    from edgerun.errors import DeviceError

    device = EmulatedArm64Device()
    try:
        device.describe()
    except DeviceError as error:
        needed = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}
        missing = [package for program, package in needed.items() if shutil.which(program) is None]
        if not missing:  # then it is our build that fails
            raise
        pytest.skip(f"{error} (not installed: {', '.join(missing)})")
    return device
