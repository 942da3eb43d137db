"""A model of the attention kernel's NEON inner loops: llvm-mca's schedule of them for two Arm cores. No measurement.

    python bench/ops/llvm_mca.py [--output FILE]

Compiles each arm64 variant of the kernel with every compiler that is here, takes the innermost loop with the most
products out of its two halves, Q.K^T and P.V, and asks llvm-mca how many cycles a round of it takes when every load
hits the first cache. Prints products (fmla of four floats, sdot, smmla) per cycle and their share of the core's
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

# llvm's scheduling model -> (vector pipes for products that its maker documents, cores of that class)
CORES = {"neoverse-n1": (2, "Cortex-A76"), "neoverse-v2": (4, "Cortex-X3, X4")}
# Not older than 16: llvm-mca has no neoverse-v2 before it. The newest found is taken.
LLVM_VERSIONS = (22, 21, 20, 19, 18, 17, 16)
ITERATIONS = 1000
# The two halves as the kernel calls them on full groups of rows, each with a name to find it by.
FUNCTIONS = {"score_rows": "Q.K^T", "weigh_rows": "P.V"}
_FLOAT = """
extern "C" void probe_score_rows(const float* q, int64_t stride, const float* const* k, int64_t depth, float* s) {
  score_rows<kRows, kWide>(q, stride, k, depth, s, false);
}
extern "C" void probe_weigh_rows(const float* p, const float* const* v, int64_t blocks, int64_t depth, float* o) {
  weigh_rows<kRows, kWide * kPerBlock>(p, v, blocks, depth, 0, o, depth);
}
"""
_INT8 = """
extern "C" void probe_score_rows(const Int8Scratch& scratch, int64_t row, int64_t block, float* s) {
  int8_score_rows<kDigitRows>(scratch, row, block, s);
}
extern "C" void probe_weigh_rows(const Int8Scratch& scratch, int64_t row, int64_t blocks, int64_t column, float* o) {
  int8_weigh_rows<kDigitRows>(scratch, row, blocks, column, o);
}
"""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel file, what it is compiled for, the product its loops are made of, and the cores that have it."""

    source: pathlib.Path
    march: str
    product: str  # a pattern of the instruction
    probes: str
    cores: tuple[str, ...] = tuple(CORES)


_KERNELS = pathlib.Path("csrc/ops/dhsa_attention")
VARIANTS = {
    "portable, float": Variant(_KERNELS / "kernels_portable.cpp", "armv8-a", r"fmla\s+v\d+\.4s", _FLOAT),
    "neon_dotprod, int8 cache": Variant(
        _KERNELS / "kernels_dotprod_neon.cpp", "armv8.2-a+dotprod", r"sdot\s+v\d+\.4s", _INT8
    ),
    "neon_i8mm, int8 cache": Variant(
        _KERNELS / "kernels_i8mm_neon.cpp", "armv8.2-a+dotprod+i8mm", r"smmla\s+v\d+\.4s", _INT8, ("neoverse-v2",)
    ),
}


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop as the compiler wrote it, and the pattern of its products."""

    lines: tuple[str, ...]
    product: str = VARIANTS["portable, float"].product

    def count(self, pattern: str) -> int:
        """Instructions that match."""
        return sum(bool(re.match(pattern, line)) for line in self.lines)

    @property
    def products(self) -> int:
        """Multiply-adds of a whole register."""
        return self.count(self.product)

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


def kernel_flags(march: str = "armv8-a") -> list[str]:
    """What CMakeLists.txt compiles the kernels with, for an architecture of arm64."""
    found = re.search(r"set\(EDGERUN_KERNEL_FLAGS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))
    if found is None:
        raise EdgerunError("CMakeLists.txt sets no EDGERUN_KERNEL_FLAGS: name here what holds the kernels' flags now")
    return ["-std=c++20", *(flag for flag in found[1].split() if not flag.startswith("-W")), f"-march={march}"]


def assembly(compiler: list[str], variant: Variant) -> str:
    """The kernel file with its probes, compiled to assembly."""
    namespace = f"namespace edgerun::dhsa::EDGERUN_VARIANT {{\n{variant.probes}\n}}"
    with tempfile.TemporaryDirectory() as folder:
        probe, out = pathlib.Path(folder) / "probe.cpp", pathlib.Path(folder) / "probe.s"
        probe.write_text(f'#include "{variant.source}"\n{namespace}\n')
        _run([*compiler, *kernel_flags(variant.march), f"-I{ROOT}", "-S", str(probe), "-o", str(out)])
        return out.read_text()


def hot_loop(text: str, function: str, product: str = VARIANTS["portable, float"].product) -> Loop:
    """The innermost loop with the most products of a function, wherever the compiler put its body."""
    loops = _loops(_functions(text).get(f"probe_{function}", []), product)
    if not loops:
        raise EdgerunError(f"no loop of {function} was found in the assembly")
    return max(loops, key=lambda loop: loop.products)


def model(llvm_mca: str, loop: Loop, core: str) -> dict[str, float]:
    """llvm-mca's cycles of one round of the loop, and what follows from them."""
    text = "\n".join([*loop.lines, ""])
    command = [llvm_mca, "-mtriple=aarch64-linux-gnu", f"-mcpu={core}", f"-iterations={ITERATIONS}"]
    done = _run(command, text)
    cycles = int(re.search(r"Total Cycles:\s+(\d+)", done)[1]) / ITERATIONS  # type: ignore[index]
    per_cycle = loop.products / cycles
    pipes = CORES[core][0]
    return {"cycles": cycles, "products_per_cycle": per_cycle, "pipes": pipes, "share": per_cycle / pipes}


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


def _loops(body: list[str], product: str) -> list[Loop]:
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
    return [
        Loop(tuple(line for line in body[start : end + 1] if not line.endswith(":")), product) for start, end in inner
    ]


def _run(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EdgerunError(f"{command[0]} failed: {done.stderr.strip()[-1500:]}")
    return done.stdout


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "neon_model.json")
    values = parser.parse_args(arguments)
    try:
        llvm_mca = find_llvm_mca()
        rows = []
        for name, variant in VARIANTS.items():
            for compiler, command in find_compilers().items():
                text = assembly(command, variant)
                for function, half in FUNCTIONS.items():
                    loop = hot_loop(text, function, variant.product)
                    cores = {core: model(llvm_mca, loop, core) for core in variant.cores}
                    row: dict[str, Any] = {"variant": name, "compiler": compiler, "function": function, "product": half}
                    row |= {"products": loop.products, "instructions": len(loop.lines), "spills": loop.spills}
                    rows.append({**row, "flags": kernel_flags(variant.march), "cores": cores, "assembly": loop.lines})
                    counts = f"{loop.products} products of {len(loop.lines)} instructions, {loop.spills} spills"
                    print(f"{half:<6} {name}, {compiler}: {counts}")
                    for core, one in cores.items():
                        print(
                            f"       {core} ({CORES[core][1]}): {one['cycles']:.1f} cycles, "
                            f"{one['products_per_cycle']:.2f} a cycle = {100 * one['share']:.0f} % of its pipes"
                        )
    except EdgerunError as error:
        sys.exit(f"error: {error}")
    report = {
        "what": "a model, not a measurement: llvm-mca's schedule of the inner loops, every load from the first cache",
        "command": " ".join(["python", "bench/ops/llvm_mca.py", *(arguments or sys.argv[1:])]),
        "commit": commit(),
        "llvm_mca": next(line.strip() for line in _run([llvm_mca, "--version"]).splitlines() if "version" in line),
        "iterations": ITERATIONS,
        "rows": rows,
    }
    write_whole(values.output, json.dumps(report, indent=1) + "\n")
    print(f"wrote {values.output}; a model, not a measurement")


if __name__ == "__main__":
    main()
