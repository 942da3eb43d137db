"""Cross-builds the runner, its libraries and the C++ tests for arm64 Linux into build-arm64/; `make arm64` runs it.

    python cmake/build_arm64.py [--folder build-arm64] [--jobs 2]

ExecuTorch comes as the aarch64 wheel of the version that is installed. The folder is laid out as an installation:
edgerun/bin, edgerun/lib and executorch/lib, so that the runner finds its libraries wherever the folder is copied.
Does nothing when the sources, the compiler and ExecuTorch are those of the last build.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMPILER = "aarch64-linux-gnu-g++"
WHEEL_PLATFORM = "manylinux_2_28_aarch64"
SOURCES = ("CMakeLists.txt", "cmake", "csrc", "edgerun/__init__.py")
NEEDED_PARTS = ("executorch/lib/", "executorch/include/", "executorch/share/cmake/")  # of the wheel


class BuildError(Exception):
    """What stopped the build, and what to do about it."""


def source_hash(compiler: str, executorch: str) -> str:
    """sha256 (hex) over every file that the build reads, the compiler's version and ExecuTorch's."""
    digest = hashlib.sha256(f"{compiler}\n{executorch}\n".encode())
    roots = [ROOT / source for source in SOURCES]
    files = [file for root in roots for file in ([root] if root.is_file() else root.rglob("*")) if file.is_file()]
    tests = ROOT.glob("tests/*/*_test.cpp")
    for file in sorted(file for file in [*files, *tests] if "__pycache__" not in file.parts):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def compiler_version() -> str:
    """The cross compiler's version line. Raises BuildError when it is not installed."""
    if shutil.which(COMPILER) is None:
        raise BuildError(f"{COMPILER} is not installed: apt install g++-aarch64-linux-gnu")
    done = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def fetch_executorch(version: str, folder: pathlib.Path) -> None:
    """Put the aarch64 wheel's libraries and headers at folder/executorch; nothing to do when they are there."""
    stamp = folder / "executorch" / "version.txt"
    if stamp.is_file() and stamp.read_text() == version:
        return
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", python, "--implementation", "cp", "--platform", WHEEL_PLATFORM]
        run([*command, "--dest", temporary, f"executorch=={version}"], "ExecuTorch's aarch64 wheel cannot be fetched")
        wheel = next(pathlib.Path(temporary).glob("*.whl"))
        unpacked = pathlib.Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(NEEDED_PARTS)])
        (unpacked / "executorch" / "version.txt").write_text(version)
        shutil.rmtree(folder / "executorch", ignore_errors=True)
        (unpacked / "executorch").replace(folder / "executorch")


def build(folder: pathlib.Path, jobs: int) -> None:
    """Configure, compile and install below `folder`."""
    cmake_folder = folder / "cmake"
    options = ["-DEDGERUN_PYTHON=OFF", "-DEDGERUN_TESTS=ON", f"-Dexecutorch_DIR={folder / 'executorch/share/cmake'}"]
    options += [f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake/aarch64-linux-gnu.cmake'}"]
    options += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    run([tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", cmake_folder, *options], "CMake cannot configure")
    run([tool("cmake"), "--build", cmake_folder, "--parallel", str(jobs)], "the sources do not compile for arm64")
    shutil.rmtree(folder / "edgerun", ignore_errors=True)
    run([tool("cmake"), "--install", cmake_folder, "--prefix", folder], "the build cannot be installed")


def tool(name: str) -> str:
    """A build tool of this environment, else of the PATH. Raises BuildError when it is nowhere."""
    beside = pathlib.Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise BuildError(f"{name} is not installed: pip install {name}")
    return found


def run(command: list[str | pathlib.Path], failure: str) -> None:
    """Run quietly; what a command that fails printed goes to the standard error."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.stderr.write(done.stdout)
        raise BuildError(f"{failure} (status {done.returncode}, its output is above)")


def main() -> int:
    """Build when needed; status 0 when build-arm64/ is as the sources are, else 2 with one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "build-arm64", help="where to build")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    try:
        compiler = compiler_version()
        executorch = importlib.metadata.version("executorch").split("+")[0]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            stamp = folder / "source.sha256"
            wanted = source_hash(compiler, executorch)
            if stamp.is_file() and stamp.read_text() == wanted:
                return 0
            stamp.unlink(missing_ok=True)
            fetch_executorch(executorch, folder)
            build(folder, arguments.jobs)
            stamp.write_text(wanted)
    except (BuildError, OSError, importlib.metadata.PackageNotFoundError) as error:
        print(f"build_arm64: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
