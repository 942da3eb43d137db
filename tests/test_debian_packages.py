""".ci/debian_packages.sh beside an apt that says what it was asked for, in a PATH of its own."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / ".ci" / "debian_packages.sh"


@pytest.fixture
def commands(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of commands: nothing is installed, root asks, and no package can be had."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name in ("mktemp", "rm", "tail", "touch"):
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    add(folder, "id", "echo 0")
    add(folder, "dpkg-query", "exit 1")
    add(folder, "apt-get", f'echo "$*" >> {tmp_path / "asked"}; exit 1')
    return folder


def add(folder: pathlib.Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def install(commands: pathlib.Path, *packages: str) -> tuple[bool, str]:
    """Whether nothing is missing afterwards, and what apt was asked for."""
    stamp, asked = commands.parent / "stamp", commands.parent / "asked"
    command = ["/bin/sh", str(SCRIPT), str(stamp), *packages]
    subprocess.run(command, env={"PATH": str(commands)}, check=True, capture_output=True)
    return stamp.exists(), asked.read_text() if asked.exists() else ""


@pytest.mark.parametrize("browser", ["chromium", "chromium-browser", "google-chrome"])
def test_a_browser_that_runs_does_for_the_package(browser: str, commands: pathlib.Path) -> None:
    add(commands, browser, '[ "$1" = --version ]')
    assert install(commands, "chromium") == (True, "")


def test_a_command_that_only_names_the_snap_does_not(commands: pathlib.Path) -> None:
    add(commands, "chromium-browser", "echo 'requires the chromium snap to be installed'; exit 1")
    done, asked = install(commands, "chromium")
    assert not done and "install -y --no-install-recommends chromium" in asked


def test_other_packages_are_asked_for_beside_a_browser(commands: pathlib.Path) -> None:
    add(commands, "google-chrome", "exit 0")
    done, asked = install(commands, "qemu-user", "chromium")
    assert not done and "qemu-user" in asked and "chromium" not in asked
