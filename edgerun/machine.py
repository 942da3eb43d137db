"""The machine that a report was made on: CPU, memory and the versions of what takes part. Linux and macOS."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import subprocess

from edgerun.report import Machine

# Packages whose version changes numbers or speed.
_PACKAGES = ("torch", "executorch", "transformers", "torchao", "numpy")
# What kernels may use, by the names of /proc/cpuinfo (x86 flags, arm64 Features) and of macOS' sysctl.
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "amx_tile")
_FEATURES_ARM = {"asimd": "neon", "fphp": "fp16", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve"}


def this_machine() -> Machine:
    """What this machine is; what cannot be found out is None or left out."""
    info = _cpu_info()
    return Machine(
        system=platform.system(),
        machine=platform.machine(),
        cpu=_cpu_name(info),
        cores=available_cores(),
        memory_bytes=_memory_bytes(),
        features=_features(info),
        versions={"python": platform.python_version(), **package_versions(_PACKAGES)},
    )


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_info() -> dict[str, str]:
    """First processor's entries of /proc/cpuinfo; empty where there is none."""
    path = pathlib.Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    entries = (line.split(":", 1) for line in path.read_text().split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in entries}


def _cpu_name(info: dict[str, str]) -> str:
    if "model name" in info:
        return info["model name"]
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _features(info: dict[str, str]) -> tuple[str, ...]:
    flags = set(info.get("flags", "").split())
    if flags:
        return tuple(name for name in _FEATURES if name in flags)
    arm = set(info.get("Features", "").split())
    return tuple(name for flag, name in _FEATURES_ARM.items() if flag in arm)


def _memory_bytes() -> int | None:
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = _sysctl("hw.memsize")
    return int(text) if text else None


def _sysctl(name: str) -> str | None:
    if platform.system() != "Darwin":
        return None
    result = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
