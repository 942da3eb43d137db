"""A board over ssh, played by an sshd on loopback with keys of its own."""

from __future__ import annotations

import dataclasses
import pathlib

import pytest

from edgerun import _library
from edgerun.devices import RunRequest, linux_ssh, open_device
from edgerun.devices.linux_ssh import LinuxSshDevice
from edgerun.devices.runner import failure
from edgerun.errors import BundleError, DeviceError
from tests.devices.conftest import Board, free_port
from tests.shared_bundle import changed_bundle

REQUEST = RunRequest(tuple(range(1, 150)), max_new_tokens=8, stop_ids=(), threads=1)


def test_a_run_is_the_hosts(board: Board, bundle: pathlib.Path) -> None:
    assert board.device.run(bundle, REQUEST).tokens == open_device("host").run(bundle, REQUEST).tokens


def test_logits_come_back(board: Board, bundle: pathlib.Path) -> None:
    request = dataclasses.replace(REQUEST, forced=(5, 6, 7))
    there, here = (device.run(bundle, request) for device in (board.device, open_device("host")))
    assert there.logits is not None and there.logits.shape == (4, 264)
    assert (there.logits == here.logits).all()


def test_describe_says_what_the_board_is(board: Board) -> None:
    facts = board.device.describe()
    assert facts["system"] == "Linux"
    assert facts["machine"] == open_device("host").describe()["machine"]


def test_a_second_run_copies_nothing(board: Board, bundle: pathlib.Path) -> None:
    board.device.run(bundle, REQUEST)
    before = {path: path.stat().st_mtime_ns for path in board.cache.rglob("*")}
    board.device.run(bundle, REQUEST)
    assert {path: path.stat().st_mtime_ns for path in board.cache.rglob("*")} == before
    assert not list(board.cache.glob("partial.*"))


def test_another_build_is_copied(board: Board, bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    board.device.run(bundle, REQUEST)
    before = set(board.cache.glob("bundle-*"))
    other = changed_bundle(bundle, tmp_path / "other; echo name.edgerun", lambda manifest: manifest.update(note=1))
    board.device.run(other, REQUEST)
    assert len(set(board.cache.glob("bundle-*")) - before) == 1


def test_the_runners_own_error_comes_back(board: Board, bundle: pathlib.Path) -> None:
    with pytest.raises(DeviceError, match=r"the prompt has 300 tokens; the context holds 256") as caught:
        board.device.run(bundle, dataclasses.replace(REQUEST, prompt=(1,) * 300))
    assert "\n" not in str(caught.value)


def test_what_is_no_bundle(board: Board, tmp_path: pathlib.Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        board.device.run(tmp_path, REQUEST)


def test_a_copy_that_breaks_leaves_nothing(board: Board, bundle: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = linux_ssh._write_tar

    def half(stream: object, files: list) -> None:
        whole(stream, files[:1])  # a whole archive of too little
        raise OSError("the cable was pulled")

    before = sorted(board.cache.iterdir()) if board.cache.is_dir() else []
    with monkeypatch.context() as patch:
        patch.setattr(linux_ssh, "_COMPLETE", "not the mark")
        patch.setattr(linux_ssh, "_write_tar", half)
        with pytest.raises(OSError, match="cable"):
            board.device._install(board.device._probe(), "bundle-broken", [(bundle / "manifest.json", "manifest.json")])
    assert not (board.cache / "bundle-broken").exists()
    assert [path for path in before if not path.exists()] == []


def test_nobody_listens(board: Board) -> None:
    device = dataclasses.replace(board.device, port=free_port())
    with pytest.raises(DeviceError, match=r"cannot be reached .*Connection refused.*start sshd there"):
        device.describe()


def test_an_unknown_host_key(board: Board, tmp_path: pathlib.Path) -> None:
    config = tmp_path / "config"
    config.write_text(board.config.read_text().replace("known_hosts", "no_hosts"))
    with pytest.raises(DeviceError, match=r"Host key verification failed.*connect once with `ssh`"):
        dataclasses.replace(board.device, config=config).describe()


def test_a_key_that_is_not_welcome(board: Board, tmp_path: pathlib.Path) -> None:
    config = tmp_path / "config"
    config.write_text(board.config.read_text().replace("/user\n", "/host\n"))
    with pytest.raises(DeviceError, match=r"Permission denied.*ssh-copy-id"):
        dataclasses.replace(board.device, config=config).describe()


def test_a_machine_that_nothing_is_built_for(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    state = linux_ssh._BoardState("riscv64", frozenset())
    monkeypatch.setattr(LinuxSshDevice, "_probe", lambda self: state)
    with pytest.raises(DeviceError, match="is a riscv64"):
        board.device.describe()


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (
            127,
            "edgerun-runner: error while loading shared libraries: libX.so.6: cannot open shared object file",
            "libX",
        ),
        (1, "edgerun-runner: /lib/libc.so.6: version `GLIBC_2.99' not found (required by libedgerun.so)", "GLIBC_2.99"),
    ],
)
def test_a_library_that_the_board_lacks(status: int, said: str, expected: str) -> None:
    message = failure("ssh:pi", status, "a banner\n" + said + "\n")
    assert message.startswith("ssh:pi lacks a library: ")
    assert expected in message
    assert "\n" not in message


def test_a_runner_that_was_killed() -> None:
    assert failure("ssh:pi", 137, "") == "ssh:pi: the runner was ended by signal 9 (out of memory?)"


def test_a_library_that_is_missing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(linux_ssh, "executorch_library_folder", lambda: tmp_path)
    with pytest.raises(DeviceError, match=r"libexecutorch\.so is missing here"):
        linux_ssh._runtime_files(open_device("host").describe()["machine"], "ssh:board")
    assert _library.op_library_path().is_file()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("pi", "pi", None),
        ("me@pi.local:2222", "me@pi.local", 2222),
        ("[::1]:22", "::1", 22),
        ("me@[fe80::1%eth0]", "me@fe80::1%eth0", None),
    ],
)
def test_names(text: str, host: str, port: int | None) -> None:
    device = LinuxSshDevice.parse(text)
    assert (device.host, device.port, device.name) == (host, port, f"ssh:{text}")


@pytest.mark.parametrize("text", ["", ":22", "pi:", "pi:x", "pi:99999", "-oProxyCommand=x", "a b", "::1", "me@"])
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(DeviceError, match="names no board"):
        LinuxSshDevice.parse(text)
