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
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from types import TracebackType
from typing import Any

import torch

from edgerun.errors import EdgerunError, ExportError
from edgerun.export.video_blocks import Geometry, frame_decoder_chain, time_decoder_chain
from edgerun.export.video_chain import export_chain, fewer_objects_to_collect
from edgerun.models.text_to_video import VideoCheckpoint
from edgerun.ops.native import native_module
from edgerun.video_recipe import VideoRecipe

DECODERS = {"time_decoder": time_decoder_chain, "frame_decoder": frame_decoder_chain}
RESULT, OUTPUT = "result.pickle", "output.txt"
ORPHANED = 3  # status of a process whose parent is gone
Exported = dict[str, list[tuple[dict[str, Any], dict[str, float]]]]  # by chain: see video_chain.export_chain


class ProcessEndedError(ExportError):
    """Something else than the export ended the process, as the system does where memory is short."""


class DecoderProcess:
    """`with DecoderProcess(…) as process: …; process.wait()`; left before, by an error or Ctrl-C, it is ended.

    Not a pool of the standard library: a script that exports need not guard its main module, and Ctrl-C reaches one.
    folder: has programs/, where the programs go.
    """

    def __init__(self, checkpoint: pathlib.Path, recipe: dict[str, Any], build: str, folder: pathlib.Path) -> None:
        self._request = {"checkpoint": str(checkpoint), "recipe": recipe, "build": build, "folder": str(folder)}

    def __enter__(self) -> DecoderProcess:
        self._temporary = tempfile.TemporaryDirectory(prefix="edgerun-export-")
        self._folder = pathlib.Path(self._temporary.name)
        self._threads = torch.get_num_threads()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start(max(1, self._threads // 2))
        except BaseException:
            self._end()
            raise
        return self

    def _start(self, threads: int) -> None:
        path = os.pathsep.join(one or str(pathlib.Path.cwd()) for one in sys.path)
        with (self._folder / OUTPUT).open("wb") as output:
            self._process = subprocess.Popen(
                # -P, -c: not from the folder that the user is in, whose random.py is none of ours
                [sys.executable, "-P", "-c", f"from {__name__} import main; main()", str(self._folder)],
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
        torch.set_num_threads(threads)  # or those of two processes wait for each other

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        torch.set_num_threads(self._threads)
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._temporary.cleanup()

    def check(self) -> None:
        """Raises what `wait` would, where that is known already, except ProcessEndedError."""
        assert self._process is not None
        if self._process.poll() == 0:
            self.wait()

    def wait(self) -> Exported:
        """What was exported. Raises what stopped the export there, ProcessEndedError where nothing of it did."""
        assert self._process is not None
        status = self._process.wait()
        if status != 0:
            said = (self._folder / OUTPUT).read_text(errors="replace").strip().splitlines()
            how = f"signal {-status}" if status < 0 else f"status {status}{': ' + said[-1] if said else ''}"
            raise ProcessEndedError(f"the process that exports the decoders was ended by {how}: export again")
        result = pickle.loads((self._folder / RESULT).read_bytes())
        if isinstance(result, BaseException):
            raise result
        found: Exported = result
        return found


def export_decoders(
    source: VideoCheckpoint, geometry: Geometry, recipe: VideoRecipe, build: str, folder: pathlib.Path
) -> Exported:
    """The work itself, in this process. Raises EdgerunError and OSError as an export does."""
    native_module().return_large_memory()
    autoencoder = source.load_autoencoder()
    found: Exported = {}
    with fewer_objects_to_collect():
        for chain, make in DECODERS.items():
            blocks, values = make(autoencoder, geometry)
            found[chain] = list(export_chain(blocks, values, geometry, recipe, build, folder, chain))
    return found


def _end_with_parent(folder: str) -> None:
    while os.read(0, 1):  # not sys.stdin's, whose lock a thread may not hold at the end
        pass
    shutil.rmtree(folder, ignore_errors=True)  # which the parent would have removed
    os._exit(ORPHANED)


def main() -> None:
    """Do what standard input asks for and leave the result in the folder of the first argument."""
    from edgerun.library_noise import quiet_libraries

    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, args=(sys.argv[1],), daemon=True).start()
    quiet_libraries()
    result: Exported | Exception
    try:
        source, recipe = (
            VideoCheckpoint.open(pathlib.Path(request["checkpoint"])),
            VideoRecipe.from_json(request["recipe"]),
        )
        geometry = Geometry.of(source, recipe)
        result = export_decoders(source, geometry, recipe, request["build"], pathlib.Path(request["folder"]))
    except Exception as error:  # raised again where it is waited for
        known = isinstance(error, EdgerunError | OSError)  # others may not survive the way
        result = error if known else ExportError(f"the decoders: {type(error).__name__}: {error}")
        result.add_note(traceback.format_exc())
    (pathlib.Path(sys.argv[1]) / RESULT).write_bytes(pickle.dumps(result))
