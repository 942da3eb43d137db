"""The machine we are on: edgerun-runner in a process of its own, so that its peak memory is a run's, not Python's."""

from __future__ import annotations

import dataclasses
import pathlib

from edgerun._library import runner_path
from edgerun.devices.runner import Report, Request, describe_locally, run_locally
from edgerun.errors import DeviceError, EdgerunError


@dataclasses.dataclass(frozen=True)
class HostDevice:
    """This machine."""

    name: str = "host"

    def describe(self) -> dict[str, object]:
        """What this machine is. Raises DeviceError when the runner is not built."""
        return describe_locally([self._runner()], self.name)

    def run(self, bundle: pathlib.Path, request: Request[Report]) -> Report:
        """Run `request` in a child process. Raises DeviceError."""
        return run_locally([self._runner()], pathlib.Path(bundle), request, self.name)

    def _runner(self) -> str:
        try:
            return str(runner_path())
        except EdgerunError as error:
            raise DeviceError(f"{self.name}: {error}") from None
