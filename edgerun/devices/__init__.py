"""Where a bundle can run: `open_device("host" | "emulated-arm64" | "ssh:[USER@]HOST[:PORT]")`."""

from __future__ import annotations

import dataclasses

from edgerun.devices.emulated_arm64 import EmulatedArm64Device
from edgerun.devices.host import HostDevice
from edgerun.devices.linux_ssh import LinuxSshDevice
from edgerun.devices.runner import Device
from edgerun.devices.text_run import RunReport, RunRequest
from edgerun.devices.video_run import VideoRunReport, VideoRunRequest
from edgerun.errors import DeviceError

__all__ = [
    "Device",
    "DeviceState",
    "RunReport",
    "RunRequest",
    "VideoRunReport",
    "VideoRunRequest",
    "list_devices",
    "open_device",
]

LOCAL_DEVICES = ("host", "emulated-arm64")
_SSH = "ssh:"


@dataclasses.dataclass(frozen=True)
class DeviceState:
    """Whether a device can run a bundle now, and why not."""

    name: str
    facts: dict[str, object] | None  # None: it cannot
    missing: str | None  # what is missing and how to get it


def open_device(name: str) -> Device:
    """The device of that name; nothing is started. Raises DeviceError for a name that is none."""
    if name == "host":
        return HostDevice()
    if name == "emulated-arm64":
        return EmulatedArm64Device()
    if name.startswith(_SSH):
        return LinuxSshDevice.parse(name.removeprefix(_SSH))
    raise DeviceError(f"there is no device {name!r}: use host, emulated-arm64 or ssh:[USER@]HOST[:PORT]")


def list_devices(names: tuple[str, ...] = LOCAL_DEVICES) -> list[DeviceState]:
    """State of each named device; never raises DeviceError for one that is missing."""
    states = []
    for name in names:
        try:
            states.append(DeviceState(name, open_device(name).describe(), None))
        except DeviceError as error:
            states.append(DeviceState(name, None, str(error)))
    return states
