"""The bundle that the device tests share with the session tests, and an sshd of this test run's own."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from edgerun.devices.linux_ssh import LinuxSshDevice
from tests.shared_bundle import RECIPE, shared_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return shared_bundle(tmp_path_factory, "tiny", RECIPE).path


@dataclasses.dataclass(frozen=True)
class Board:
    """An sshd on loopback: `device` reaches it with the right keys, `cache` is where its user's files land."""

    device: LinuxSshDevice
    port: int
    config: pathlib.Path
    folder: pathlib.Path
    cache: pathlib.Path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    sshd = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("sshd is not installed: apt install openssh-server")
    folder = tmp_path_factory.mktemp("a board")  # a path with a space
    keys = tmp_path_factory.mktemp("keys")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
    port, cache = free_port(), folder / "its cache"
    user = pwd.getpwuid(os.getuid()).pw_name
    (keys / "authorized").write_text(f'environment="XDG_CACHE_HOME={cache}" ' + (keys / "user.pub").read_text())
    host_key = " ".join((keys / "host.pub").read_text().split()[:2])
    (keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    (keys / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {keys / 'host'}\nAuthorizedKeysFile {keys / 'authorized'}\n"
        f"PidFile {keys / 'pid'}\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitUserEnvironment yes\n"
        "PermitRootLogin prohibit-password\n"
    )
    config = keys / "ssh_config"
    config.write_text(
        f"Host *\n  User {user}\n  IdentityFile {keys / 'user'}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
        f"  UserKnownHostsFile {keys / 'known_hosts'}\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n"
    )
    if os.getuid() == 0:
        pathlib.Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd as root wants it
    with (keys / "log").open("w") as log:
        process = subprocess.Popen([sshd, "-D", "-e", "-f", keys / "sshd_config"], stderr=log)
    try:
        wait_for_port(port, process, keys / "log")
        yield Board(LinuxSshDevice("127.0.0.1", port, config), port, config, folder, cache / "edgerun")
    finally:
        process.terminate()
        process.wait(10)


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: pathlib.Path) -> None:
    for _ in range(200):
        if process.poll() is not None:
            pytest.fail(f"sshd ended: {log.read_text()}")
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail("sshd did not listen within 10 s")
