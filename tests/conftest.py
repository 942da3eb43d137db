"""What holds for every test: one thread a worker, no network, the smoke test first, and no quiet skip in CI."""

from __future__ import annotations

import os

# Before torch is imported: the test workers share the cores, so each takes one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

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
