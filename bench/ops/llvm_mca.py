"""A model of the attention kernel's NEON inner loops: llvm-mca's schedule of them for two Arm cores. No measurement.

    python bench/ops/llvm_mca.py [--source csrc/ops/dhsa_attention/kernels_portable.cpp] [--lengths ...]

Compiles the kernel file for arm64 with every compiler that is here, takes the innermost loop with the most
multiply-adds out of score_rows (Q.K^T) and weigh_rows (P.V), and asks llvm-mca how many cycles a round of it takes when
every load hits the first cache. Prints multiply-adds (fmla of four floats) per cycle and their share of the core's
documented pipes, and writes bench/results/neon_model.json. Needs Debian's llvm-19 and clang-19 or
g++-aarch64-linux-gnu.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from bench.harness import RESULTS, ROOT, commit
from edgerun.errors import EdgerunError
from edgerun.report import write_whole

# llvm's scheduling model -> (vector multiply-add pipes that its maker documents, cores of that class)
CORES = {"neoverse-n1": (2, "Cortex-A76"), "neoverse-v2": (4, "Cortex-X3, X4")}
# Not older than 16: llvm-mca has no neoverse-v2 before it. The newest found is taken.
LLVM_VERSIONS = (22, 21, 20, 19, 18, 17, 16)
ITERATIONS = 1000
# The two functions as the kernel calls them on full groups of rows, each with a name to find it by.
PROBES = """
#include "{source}"
namespace edgerun::dhsa::EDGERUN_VARIANT {{
extern "C" void probe_score_rows(const float* q, int64_t stride, const float* const* k, int64_t depth, float* s) {{
  score_rows<kRows, kWide>(q, stride, k, depth, s, false);
}}
extern "C" void probe_weigh_rows(const float* p, const float* const* v, int64_t blocks, int64_t depth, float* o) {{
  weigh_rows<kRows, kWide * kPerBlock>(p, v, blocks, depth, 0, o, depth);
}}
}}
"""
FUNCTIONS = {"score_rows": "Q.K^T", "weigh_rows": "P.V"}


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop as the compiler wrote it."""

    lines: tuple[str, ...]

    def count(self, pattern: str) -> int:
        """Instructions that match."""
        return sum(bool(re.match(pattern, line)) for line in self.lines)

    @property
    def multiply_adds(self) -> int:
        """fmla of a whole register of floats."""
        return self.count(r"fmla\s+v\d+\.4s")

    @property
    def spills(self) -> int:
        """Vector registers written to or read back from the stack."""
        return self.count(r"(?:ldr|str|ldp|stp|ldur|stur)\s+q\d+,.*\[sp")


def find_compilers() -> dict[str, list[str]]:
    """Name and version -> the command that compiles for arm64: the newest clang, and Debian's cross g++."""
    commands = []
    for version in LLVM_VERSIONS:
        if shutil.which(f"clang++-{version}"):
            commands.append([f"clang++-{version}", "--target=aarch64-linux-gnu"])
            break
    if shutil.which("aarch64-linux-gnu-g++"):
        commands.append(["aarch64-linux-gnu-g++"])
    if not commands:
        raise EdgerunError("no compiler for arm64 is here: apt install clang-19, or g++-aarch64-linux-gnu")
    return {_run([*command, "--version"]).splitlines()[0]: command for command in commands}


def find_llvm_mca() -> str:
    """The newest llvm-mca that knows both cores."""
    for version in LLVM_VERSIONS:
        if shutil.which(f"llvm-mca-{version}"):
            return f"llvm-mca-{version}"
    raise EdgerunError("no llvm-mca of version 16 or later is here: apt install llvm-19")


def kernel_flags() -> list[str]:
    """What CMakeLists.txt compiles the kernels with, for the baseline of arm64."""
    found = re.search(r"set\(EDGERUN_KERNEL_FLAGS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    if found is None:
        raise EdgerunError("CMakeLists.txt sets no EDGERUN_KERNEL_FLAGS: name here what holds the kernels' flags now")
    return ["-std=c++20", *(flag for flag in found[1].split() if not flag.startswith("-W")), "-march=armv8-a"]


def assembly(compiler: list[str], source: pathlib.Path, flags: list[str]) -> str:
    """The kernel file with its probes, compiled to assembly."""
    with tempfile.TemporaryDirectory() as folder:
        probe, out = pathlib.Path(folder) / "probe.cpp", pathlib.Path(folder) / "probe.s"
        probe.write_text(PROBES.format(source=source))
        _run([*compiler, *flags, f"-I{ROOT}", "-S", str(probe), "-o", str(out)])
        return out.read_text()


def hot_loop(text: str, function: str) -> Loop:
    """The innermost loop with the most multiply-adds of a function, wherever the compiler put its body."""
    loops = _loops(_functions(text).get(f"probe_{function}", []))
    if not loops:
        raise EdgerunError(f"no loop of {function} was found in the assembly")
    return max(loops, key=lambda loop: loop.multiply_adds)


def model(llvm_mca: str, loop: Loop, core: str) -> dict[str, float]:
    """llvm-mca's cycles of one round of the loop, and what follows from them."""
    text = "\n".join([*loop.lines, ""])
    command = [llvm_mca, "-mtriple=aarch64-linux-gnu", f"-mcpu={core}", f"-iterations={ITERATIONS}"]
    done = _run(command, text)
    cycles = int(re.search(r"Total Cycles:\s+(\d+)", done)[1]) / ITERATIONS  # type: ignore[index]
    per_cycle = loop.multiply_adds / cycles
    pipes = CORES[core][0]
    return {"cycles": cycles, "multiply_adds_per_cycle": per_cycle, "pipes": pipes, "share": per_cycle / pipes}


def _functions(text: str) -> dict[str, list[str]]:
    """Instructions and labels of each function, comments and directives left out; a callee joins its probe."""
    functions: dict[str, list[str]] = {}
    current: list[str] = []
    for raw in text.splitlines():
        line = re.split(r"//|\s;", raw)[0].strip()
        if found := re.fullmatch(r"([A-Za-z_][\w.$]*):", line):
            current = functions.setdefault(found[1], [])
        elif line and (line.startswith(".L") or not line.startswith(".")):
            current.append(line)
    for name, body in functions.items():
        if name.startswith("probe_"):  # a call that was not inlined, in most cases as the last instruction
            for called in re.findall(r"^(?:b|bl)\s+(_Z[\w.$]*)$", "\n".join(body), re.MULTILINE):
                body += functions.get(called, [])
    return functions


def _loops(body: list[str]) -> list[Loop]:
    """Innermost loops: from a label to the branch back to it, with no such loop inside."""
    labels = {line[:-1]: index for index, line in enumerate(body) if line.startswith(".L") and line.endswith(":")}
    spans = []
    for index, line in enumerate(body):
        found = re.match(r"(?:b\.?\w*|cbn?z|tbn?z)\s+(?:.*,\s*)?(\.L[\w$]+)$", line)
        if found and labels.get(found[1], len(body)) <= index:
            spans.append((labels[found[1]], index))

    def holds(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
        return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]

    inner = [one for one in spans if not any(holds(one, other) for other in spans)]
    return [Loop(tuple(line for line in body[start : end + 1] if not line.endswith(":"))) for start, end in inner]


def _run(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EdgerunError(f"{command[0]} failed: {done.stderr.strip()[-1500:]}")
    return done.stdout


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = pathlib.Path("csrc/ops/dhsa_attention/kernels_portable.cpp")
    parser.add_argument("--source", type=pathlib.Path, default=default, help="the kernel file, from the root")
    parser.add_argument("--march", help="instead of armv8-a, for a variant of a later architecture")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "neon_model.json")
    values = parser.parse_args(arguments)
    flags = [*kernel_flags(), *([f"-march={values.march}"] if values.march else [])]
    try:
        llvm_mca = find_llvm_mca()
        rows = []
        for compiler, command in find_compilers().items():
            text = assembly(command, values.source, flags)
            for function, product in FUNCTIONS.items():
                loop = hot_loop(text, function)
                cores = {core: model(llvm_mca, loop, core) for core in CORES}
                row: dict[str, Any] = {"compiler": compiler, "function": function, "product": product}
                row |= {"multiply_adds": loop.multiply_adds, "instructions": len(loop.lines), "spills": loop.spills}
                rows.append({**row, "cores": cores, "assembly": list(loop.lines)})
                counts = f"{loop.multiply_adds} fmla of {len(loop.lines)} instructions, {loop.spills} spills"
                print(f"{product:<6} {compiler}: {counts}")
                for core, one in cores.items():
                    print(
                        f"       {core} ({CORES[core][1]}): {one['cycles']:.1f} cycles, "
                        f"{one['multiply_adds_per_cycle']:.2f} fmla per cycle = {100 * one['share']:.0f} % of its pipes"
                    )
    except EdgerunError as error:
        sys.exit(f"error: {error}")
    report = {
        "what": "a model, not a measurement: llvm-mca's schedule of the inner loops, every load from the first cache",
        "command": " ".join(["python", "bench/ops/llvm_mca.py", *(arguments or sys.argv[1:])]),
        "commit": commit(),
        "source": str(values.source),
        "flags": flags,
        "llvm_mca": next(line.strip() for line in _run([llvm_mca, "--version"]).splitlines() if "version" in line),
        "iterations": ITERATIONS,
        "rows": rows,
    }
    write_whole(values.output, json.dumps(report, indent=1) + "\n")
    print(f"wrote {values.output}; a model, not a measurement")


if __name__ == "__main__":
    main()
