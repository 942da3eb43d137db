"""The rules that hold the house up: names, directions of import, what a kernel may know, and unfinished work."""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPS = sorted(folder.name for folder in (ROOT / "csrc" / "ops").iterdir() if folder.is_dir())
MOST_LINES_OF_A_BINDING = 60  # a function that translates an op for a framework
FRAMEWORKS = ("executorch", "torch", "ATen", "c10", "pybind11", "coreml", "onnx")


def python_files(*folders: str) -> Iterator[pathlib.Path]:
    """Python sources below folders of the repository."""
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imported(path: pathlib.Path) -> set[str]:
    """Every module that a file imports, wherever in the file, in full."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(files: Iterator[pathlib.Path], *modules: str) -> list[str]:
    """Files that import one of the modules, or anything below it."""

    def matches(name: str) -> bool:
        return any(name == module or name.startswith(f"{module}.") for module in modules)

    return [str(path.relative_to(ROOT)) for path in files if any(map(matches, imported(path)))]


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_one_name_in_every_place(op: str) -> None:
    places = (
        f"csrc/ops/{op}/{op}.h",
        f"csrc/ops/{op}/{op}_portable.cpp",
        f"edgerun/ops/{op}.py",
        f"tests/ops/test_{op}.py",
    )
    assert [place for place in places if not (ROOT / place).is_file()] == []


def test_every_registered_op_has_its_sources() -> None:
    registered = set()
    for path in python_files("edgerun/ops"):
        registered |= set(re.findall(r'"(?:edgerun::)?(\w+)\((?:Tensor|\w+) ', path.read_text(encoding="utf-8")))
    assert {name for name in registered if not (ROOT / "csrc" / "ops" / name).is_dir()} == set()


def test_the_package_never_imports_bench_or_tests() -> None:
    assert importers(python_files("edgerun", "export"), "bench", "tests") == []


def test_only_the_command_line_imports_the_exporter() -> None:
    users = importers((p for p in python_files("edgerun") if p != ROOT / "edgerun/cli.py"), "edgerun.export")
    assert users == []


def test_a_technique_does_not_know_the_target() -> None:
    files = python_files("edgerun/techniques", "edgerun/models")
    assert importers(files, "edgerun.export", "executorch.exir", "executorch.backends", "coremltools", "onnx") == []


def test_a_lowering_does_not_know_the_technique() -> None:
    assert importers(python_files("export/lower"), "edgerun.techniques") == []


def kernel_files() -> list[pathlib.Path]:
    """C++ of the ops that is neither a binding nor shared by bindings."""
    files = [p for p in (ROOT / "csrc" / "ops").rglob("*") if p.suffix in (".cpp", ".h")]
    bindings = [p for p in files if p.name.endswith("_executorch.cpp")]
    known = {p.name for p in files if any(f'/{p.name}"' in b.read_text(encoding="utf-8") for b in bindings)}
    shared = {p for p in files if p.name in known and "executorch" in p.read_text(encoding="utf-8").lower()}
    return [p for p in files if p not in bindings and p not in shared]


@pytest.mark.parametrize("path", kernel_files(), ids=lambda path: path.name)
def test_a_kernel_knows_no_framework(path: pathlib.Path) -> None:
    includes = re.findall(r'#include [<"]([^>"]+)', path.read_text(encoding="utf-8"))
    assert [name for name in includes if name.split("/")[0] in FRAMEWORKS] == []


@pytest.mark.parametrize("path", kernel_files(), ids=lambda path: path.name)
def test_a_kernel_allocates_logs_and_throws_nothing(path: pathlib.Path) -> None:
    code = re.sub(r"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert (
        re.findall(r"\b(?:malloc|calloc|realloc|throw|printf|fprintf|cout|cerr|std::vector)\b|\bnew\s+\w", code) == []
    )


def bindings() -> list[pathlib.Path]:
    """Files that translate an op for ExecuTorch."""
    return sorted((ROOT / "csrc" / "ops").glob("*/*_executorch.cpp"))


@pytest.mark.parametrize("path", bindings(), ids=lambda path: path.name)
def test_a_function_of_a_binding_is_short(path: pathlib.Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines) if re.match(r"[A-Za-z].*\(", line)]
    lengths = {
        lines[i]: next(n for n, line in enumerate(lines[i:], 1) if line == "}") for i in starts if "}" in lines[i:]
    }
    assert {name: n for name, n in lengths.items() if n >= MOST_LINES_OF_A_BINDING} == {}


def source_files() -> list[pathlib.Path]:
    """Sources of every language, this file left out: it names what it looks for."""
    folders = ("edgerun", "export", "csrc", "tests", "bench")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".mm")]
    return [p for p in files if p != pathlib.Path(__file__).resolve()]


def test_nothing_is_left_unfinished() -> None:
    pattern = re.compile(r"\b(?:TODO|FIXME|XXX|raise NotImplementedError)\b|except:|except Exception:\s*pass")
    found = [f"{p.relative_to(ROOT)}: {m[0]}" for p in source_files() for m in pattern.finditer(p.read_text("utf-8"))]
    assert found == []


def test_no_flag_is_parsed_by_bool() -> None:
    assert [str(p) for p in python_files("edgerun", "export", "bench") if "type=bool" in p.read_text("utf-8")] == []


def test_no_path_of_one_machine_is_in_the_tree() -> None:
    home = re.compile(r"(?<![\w./])/(?:home|root|Users|work)/\w+")
    found = [f"{p.relative_to(ROOT)}: {m[0]}" for p in source_files() for m in home.finditer(p.read_text("utf-8"))]
    assert found == []


def test_versions_stand_in_one_place() -> None:
    pinned = re.compile(r"\b(?:torch|executorch|transformers|coremltools)==\d")
    makefile, run = ROOT / "Makefile", ROOT / ".ci" / "run"
    assert [str(p) for p in (makefile, run) if pinned.search(p.read_text("utf-8"))] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []
