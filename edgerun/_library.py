"""Where the native files are: the op library, the runtime and the runner, all beside `edgerun._native`.

A kernel that is registered twice ends the process, so `load_op_library` loads the one file only, whose second loading
the system recognises, and only when nothing else in the process has registered its ops.
"""

from __future__ import annotations

import ctypes
import importlib.util
import pathlib
import platform

from edgerun.errors import EdgerunError

_BUILD = "build it with `pip install --no-build-isolation -e .`"
_SUFFIX = ".dylib" if platform.system() == "Darwin" else ".so"


def native_folder() -> pathlib.Path:
    """The folder that holds `_native` and, in lib and bin, what it stands on. Raises EdgerunError when not built."""
    found = importlib.util.find_spec("edgerun._native")
    if found is None or found.origin is None:
        raise EdgerunError(f"edgerun's native part is not there: {_BUILD}")
    return pathlib.Path(found.origin).parent


def op_library_path() -> pathlib.Path:
    """The library that an edgerun program needs in any ExecuTorch runtime. Raises EdgerunError when not built."""
    return _existing(native_folder() / "lib" / f"libedgerun_ops{_SUFFIX}")


def runtime_library_path() -> pathlib.Path:
    """The library behind `csrc/bindings/c_api.h`. Raises EdgerunError when not built."""
    return _existing(native_folder() / "lib" / f"libedgerun{_SUFFIX}")


def runner_path() -> pathlib.Path:
    """The `edgerun-runner` executable of this machine. Raises EdgerunError when not built."""
    return _existing(native_folder() / "bin" / "edgerun-runner")


def executorch_library_folder() -> pathlib.Path:
    """The folder of ExecuTorch's shared libraries, which ours need. Raises EdgerunError when it is not installed."""
    found = importlib.util.find_spec("executorch")
    folders = list(found.submodule_search_locations or []) if found is not None else []
    if not folders:
        raise EdgerunError("executorch is not installed: `pip install executorch==1.5.1`")
    return _existing(pathlib.Path(folders[0]) / "lib")


def load_op_library() -> pathlib.Path:
    """Make edgerun's ops known to ExecuTorch in this process, once; for ExecuTorch's own runners.

    Returns the library's path. Raises EdgerunError when it does not load, or when another copy of it is loaded already.
    """
    path = op_library_path()
    other = _loaded_copy(path)
    if other is not None:
        raise EdgerunError(f"{other} is loaded already, and loading {path} too would end the process: load one of them")
    # ExecuTorch's Python library first: it brings the runtime that the op library registers with.
    import executorch.extension.pybindings.portable_lib  # noqa: F401

    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise EdgerunError(f"{path} does not load ({error}): {_BUILD}") from None
    return path


def _loaded_copy(path: pathlib.Path) -> pathlib.Path | None:
    """Another file of the same name that this process has mapped; None where the system does not tell."""
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists():
        return None
    mapped = {line.split(None, 5)[5] for line in maps.read_text().splitlines() if line.endswith(path.name)}
    others = [pathlib.Path(name) for name in sorted(mapped) if not path.samefile(name)]
    return others[0] if others else None


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.exists():
        raise EdgerunError(f"{path} is not there: {_BUILD}")
    return path
