"""The two decoders of a video model are exported in a process of their own, while this one exports the rest.

Lowering keeps one core busy, whatever the model. What the other process found or raised is as if it had happened here.
It reads its work from its standard input, whose end tells it that nobody waits any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import pickle
import subprocess
import sys
import tempfile
import threading
import traceback
from types import TracebackType
from typing import Any

import torch

from edgerun.errors import ExportError
from edgerun.export.video_blocks import Geometry, frame_decoder_chain, time_decoder_chain
from edgerun.export.video_chain import export_chain
from edgerun.models.text_to_video import VideoCheckpoint
from edgerun.video_recipe import VideoRecipe

DECODERS = {"time_decoder": time_decoder_chain, "frame_decoder": frame_decoder_chain}
RESULT, OUTPUT = "result.pickle", "output.txt"
Exported = dict[str, list[tuple[dict[str, Any], dict[str, float]]]]  # by chain: see video_chain.export_chain


class DecoderProcess:
    """`with DecoderProcess(…) as process: …; process.wait()`; left before, by an error or Ctrl-C, it is ended.

    folder: has programs/, where the programs go.
    """

    def __init__(self, checkpoint: pathlib.Path, recipe: dict[str, Any], build: str, folder: pathlib.Path) -> None:
        self._request = {"checkpoint": str(checkpoint), "recipe": recipe, "build": build, "folder": str(folder)}

    def __enter__(self) -> DecoderProcess:
        self._temporary = tempfile.TemporaryDirectory(prefix="edgerun-export-")
        self._folder = pathlib.Path(self._temporary.name)
        threads = max(1, torch.get_num_threads() // 2)
        path = os.pathsep.join(one for one in sys.path if one)
        with (self._folder / OUTPUT).open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,  # Ctrl-C is for this process, which then ends the other
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `wait` says what it died of
            self._process.stdin.write(json.dumps(self._request).encode() + b"\n")
            self._process.stdin.flush()
        self._threads = torch.get_num_threads()
        torch.set_num_threads(threads)  # or those of two processes wait for each other
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads)
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._temporary.cleanup()

    def wait(self) -> Exported:
        """What was exported. Raises what stopped the export there; ExportError when the process itself was ended."""
        status = self._process.wait()
        if status != 0:
            said = (self._folder / OUTPUT).read_text(errors="replace").strip().splitlines()
            how = f"signal {-status}" if status < 0 else f"status {status}"
            raise ExportError(
                f"the process that exports the decoders was ended by {how}{': ' + said[-1] if said else ''}; nothing "
                "was published. Export again, where memory was short with less beside it"
            )
        result = pickle.loads((self._folder / RESULT).read_bytes())
        if isinstance(result, BaseException):
            raise result
        found: Exported = result
        return found


def export_decoders(checkpoint: pathlib.Path, recipe: dict[str, Any], build: str, folder: pathlib.Path) -> Exported:
    """The work itself, in this process. Raises EdgerunError and OSError as an export does."""
    source, made = VideoCheckpoint.open(checkpoint), VideoRecipe.from_json(recipe)
    geometry, autoencoder = Geometry.of(source, made), source.load_autoencoder()
    found: Exported = {}
    for chain, make in DECODERS.items():
        blocks, values = make(autoencoder, geometry)
        found[chain] = list(export_chain(blocks, values, geometry, made, build, folder, chain))
    return found


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin's, whose lock a thread may not hold at the end
        pass
    os._exit(1)


def main() -> None:
    """Do what standard input asks for and leave the result in the folder of the first argument."""
    from edgerun.library_noise import quiet_libraries

    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()
    result: Exported | Exception
    try:
        result = export_decoders(
            pathlib.Path(request["checkpoint"]), request["recipe"], request["build"], pathlib.Path(request["folder"])
        )
    except Exception as error:  # raised again where it is waited for
        error.add_note(traceback.format_exc())
        result = error
    (pathlib.Path(sys.argv[1]) / RESULT).write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main()
