"""The package as users get it: a wheel, installed into another environment, works outside the source tree."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.xdist_group("wheel")  # one worker builds it


def run(command: list[str], cwd: pathlib.Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Built from the tree in a folder of its own, so that the tree's build is left alone."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["--config-settings=build-dir=" + str(folder / "build")]
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        *build,
        "-w",
        str(folder),
        ".",
    ]
    run(command, ROOT)
    return next(folder.glob("edgerun-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An environment with the wheel; what it depends on is lent by this one, which has it already."""
    folder = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder)
    python = folder / "bin" / "python"
    target = pathlib.Path(
        run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    )
    prefix = ["--prefix", str(folder), "--no-deps", "--quiet", "--no-compile"]
    run([sys.executable, "-m", "pip", "--python", str(python), "install", *prefix, str(wheel)], folder)
    lent = pathlib.Path(sysconfig.get_path("purelib"))
    for package in lent.iterdir():  # all but edgerun itself, which is installed there as an editable
        ours = package.name.startswith(("edgerun", "_editable_skbc_edgerun")) or package.suffix == ".pth"
        if not ours and not (target / package.name).exists():
            (target / package.name).symlink_to(package)
    return folder


def test_wheel_holds_package_exporter_and_native_parts(wheel: pathlib.Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for part in (
        "edgerun/cli.py",
        "edgerun/export/pipeline.py",
        "edgerun/zoo/text/model.safetensors",
        "edgerun/zoo/video/denoiser/model.safetensors",
        "edgerun/bin/edgerun-runner",
        "edgerun/py.typed",
    ):
        assert part in names
    assert any(name.startswith("edgerun/_native") for name in names)
    assert any(name.startswith("edgerun/lib/libedgerun_ops") for name in names)
    assert not [name for name in names if name.split("/")[0] in ("tests", "bench", "csrc", "export")]


def test_doctor_finds_everything_outside_the_tree(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = run([str(installed / "bin" / "edgerun"), "doctor", "--json"], tmp_path)
    rows = {row[0]: row for row in json.loads(output)["tables"][0]["rows"]}
    assert [name for name, row in rows.items() if row[2] == "all" and row[1] != "ok"] == []
    assert str(installed) in rows["op library"][3] and str(installed) in rows["runner"][3]


def test_installed_package_is_not_the_tree(installed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    where = run(
        [str(installed / "bin" / "python"), "-c", "import edgerun.export; print(edgerun.export.__file__)"], tmp_path
    )
    assert where.startswith(str(installed))
