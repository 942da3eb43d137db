"""tests/ops/dhsa_attention_test.cpp, built apart from everything else: on emulated Arm cores and under sanitizers."""

from __future__ import annotations

import pathlib
import platform
import shutil
import subprocess

import pytest

from edgerun.ops.native import native_module

ROOT = pathlib.Path(__file__).resolve().parents[2]
OP = ROOT / "csrc/ops/dhsa_attention"
# What CMakeLists.txt compiles each variant with.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
X86 = {
    "kernels_avx2.cpp": AVX2,
    "kernels_avx512.cpp": (*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512"),
}
ARM64 = {
    "kernels_dotprod_neon.cpp": ("-march=armv8.2-a+dotprod",),
    "kernels_i8mm_neon.cpp": ("-march=armv8.2-a+dotprod+i8mm",),
}
ARM64_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# Core -> the variant that it must be given: the baseline, 8-bit dot products, 8-bit matrix products.
CORES = {"cortex-a53": "portable", "cortex-a76": "neon_dotprod", "max": "neon_i8mm"}


def built(folder: pathlib.Path, compiler: str, variants: dict[str, tuple[str, ...]], *options: str) -> pathlib.Path:
    """The test program with these kernel variants beside the portable one."""
    command = [compiler, "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
    command += [f"-I{ROOT}", *options]
    objects = []
    for name, flags in variants.items():
        objects.append(folder / f"{name}.o")
        subprocess.run([*command, *flags, "-c", OP / name, "-o", objects[-1]], check=True)
    sources = [ROOT / "tests/ops/dhsa_attention_test.cpp", ROOT / "csrc/base/cpu_features.cpp"]
    sources += sorted(OP.glob("*_portable.cpp"))
    subprocess.run([*command, *sources, *objects, "-o", folder / "test"], check=True)
    return folder / "test"


def assert_passes(command: list[object], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=1500, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="module")
def arm64_program(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    require_arm64()
    return built(tmp_path_factory.mktemp("arm64"), ARM64_COMPILER, ARM64, "-O3", "-static")


def require_arm64() -> None:
    for program, package in ((ARM64_COMPILER, "g++-aarch64-linux-gnu"), (EMULATOR, "qemu-user")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt install {package}")


@pytest.mark.xdist_group("arm64 kernels")
@pytest.mark.parametrize("core", CORES)
def test_each_arm_core_gets_its_variant_and_the_laws_hold(arm64_program: pathlib.Path, core: str) -> None:
    emulated = [EMULATOR, "-cpu", core, arm64_program]
    done = subprocess.run([*map(str, emulated), "none"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"no variant none here; the fastest is {CORES[core]}\n"
    assert_passes([*emulated, CORES[core]])


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_laws_hold_under_sanitizers(tmp_path: pathlib.Path, sanitizers: str) -> None:
    compiler = shutil.which("c++")
    if compiler is None or platform.machine() != "x86_64" or "avx2" not in native_module().dhsa_variants():
        pytest.skip("needs a C++ compiler and an x86-64 CPU with AVX2")
    options = ("-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    assert_passes([built(tmp_path, compiler, X86, *options)])


@pytest.mark.slow
def test_laws_hold_under_sanitizers_on_arm64(tmp_path: pathlib.Path) -> None:
    """Leaks apart: their search needs ptrace, which the emulator lacks."""
    require_arm64()
    options = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-static-libasan")
    program = built(tmp_path, ARM64_COMPILER, ARM64, *options)
    libraries = {"QEMU_LD_PREFIX": "/usr/aarch64-linux-gnu", "ASAN_OPTIONS": "detect_leaks=0"}
    for variant in CORES.values():
        assert_passes([EMULATOR, "-cpu", "max", program, variant], libraries | {"PATH": "/usr/bin:/bin"})
