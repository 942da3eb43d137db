"""The parts of the runtime that need no program, compiled alone and run: JSON, SHA-256, sampler, block schedule."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHA256 = (
    "csrc/base/sha256.cpp",
    "csrc/base/sha256_x86.cpp",
    "csrc/base/sha256_arm64.cpp",
    "csrc/base/cpu_features.cpp",
)
SOURCES = {
    "json": ("csrc/base/json.cpp",),
    "sha256": SHA256,
    "sampler": ("csrc/runtime/sampler.cpp",),
    "block_schedule": ("csrc/runtime/block_schedule.cpp", "csrc/runtime/block_plan.cpp", "-pthread"),
}
DRAWS = 4000
# Chi-square beyond this many standard deviations over its mean: 5 is one in about a million; the seed is fixed.
CHI_SQUARE_DEVIATIONS = 5.0


@dataclasses.dataclass(frozen=True)
class Program:
    command: tuple[str, ...]

    def __call__(self, *arguments: object) -> tuple[int, str]:
        done = subprocess.run([*self.command, *map(str, arguments)], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout.rstrip("\n")


def compiled(name: str, folder: pathlib.Path, compiler: str = "g++", *options: str) -> pathlib.Path:
    """The test program of that name, with the parts it tests."""
    command = [compiler, "-std=c++20", "-O1", "-ffp-contract=off", "-I.", *options, "-o", folder / name]
    subprocess.run([*command, f"tests/runtime/{name}_test.cpp", *SOURCES[name]], cwd=ROOT, check=True)
    return folder / name


SANITIZED = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module", params=[(), SANITIZED], ids=["plain", "sanitized"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Program]:
    """Each as it is, and with what ends it at a fault that it would survive."""
    folder = tmp_path_factory.mktemp("programs")
    names = ("json", "sha256", "sampler")
    return {name: Program((str(compiled(name, folder, "g++", *request.param)),)) for name in names}


THREAD_SANITIZED = ("-g", "-fsanitize=thread")


@pytest.mark.parametrize("options", [(), SANITIZED, THREAD_SANITIZED], ids=["plain", "sanitized", "threads"])
def test_block_schedule(tmp_path: pathlib.Path, options: tuple[str, ...]) -> None:
    """Every case of block_schedule_test.cpp; one that hangs ends itself."""
    program = Program((str(compiled("block_schedule", tmp_path, "g++", *options)),))
    status, names = program()
    assert status == 0 and "a_thread_that_dies_is_reported" in names
    failed = {name: result for name in names.split() if (result := program(name))[0] != 0}
    assert failed == {}


def write(tmp_path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    file = tmp_path / "input"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -2, 0, 9007199254740993, 1.5, -2.5e-300, 1e300], "b": {"c": None, "d": [True, False, []], "e": {}}},
        ["", 'quote " backslash \\ slash / newline \n tab \t control \x01', "ünïcode 漢字 \U0001f600"],
        -9223372036854775808,
        18446744073709551616.0,
    ],
)
def test_json_reads_what_python_writes(programs: dict[str, Program], tmp_path: pathlib.Path, value: object) -> None:
    for ascii_only in (True, False):
        status, text = programs["json"](write(tmp_path, json.dumps(value, ensure_ascii=ascii_only, indent=1)))
        assert (status, json.loads(text)) == (0, value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1,]", '{"a":1,}', "{'a':1}", "01", "1.", ".5", "+1", "1e", "nul", "NaN", "[1] 2", '"\\x"', '"\\ud800"',
     '"a\nb"', '"open', '{"a":1,"a":2}', '{"a" 1}', "[1 2]", "1e999", "[" * 100 + "]" * 100, "// 1\n1"],
)  # fmt: skip
def test_json_refuses(programs: dict[str, Program], tmp_path: pathlib.Path, text: str) -> None:
    status, message = programs["json"](write(tmp_path, text))
    assert status == 1
    assert message.startswith("not JSON at line ")


@pytest.mark.parametrize(
    "text",
    [b"\xff", b"\xc0\x80", b"\xe2\x82", b"\xed\xa0\x80", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xf4\x90\x80\x80"],
)
def test_json_refuses_what_is_not_utf8(programs: dict[str, Program], tmp_path: pathlib.Path, text: bytes) -> None:
    status, message = programs["json"](write(tmp_path, b'["' + text + b'"]'))
    assert (status, message) == (1, "not JSON at line 1, column 3: a string that is not UTF-8")


def test_json_reads_many_members(programs: dict[str, Program], tmp_path: pathlib.Path) -> None:
    """A hundred thousand within the program's minute: a name is not compared with all before it."""
    value = {f"member {index}": index for index in range(100_000)}
    status, text = programs["json"](write(tmp_path, json.dumps(value)))
    assert (status, json.loads(text)) == (0, value)


def test_json_finds_members_by_path(programs: dict[str, Program], tmp_path: pathlib.Path) -> None:
    file = write(tmp_path, '{"a": {"b": {"c": 7}}, "x.y": {"z": 8}, "programs/text.pte": 9}')
    found = {path: programs["json"](file, path)[1] for path in ("a.b.c", "programs/text.pte", "a.c", "a.b.c.d", "q")}
    assert found == {"a.b.c": "7", "programs/text.pte": "9", "a.c": "null", "a.b.c.d": "null", "q": "null"}


def assert_is_hashlibs(
    program: Program, tmp_path: pathlib.Path, sizes: tuple[int, ...], steps: tuple[int, ...]
) -> None:
    """Every variant that runs there, with files of `sizes` bytes that it gets `steps` bytes at a time."""
    status, names = program()
    assert status == 0 and names.split()[-1] == "portable"
    for size in sizes:
        content = np.random.default_rng(size).bytes(size)
        file = write(tmp_path, content)
        digests = {program(file, step, name)[1] for step in steps for name in names.split()}
        assert digests == {hashlib.sha256(content).hexdigest()}


BLOCK_EDGES = (0, 1, 3, 55, 56, 63, 64, 65, 119, 120, 127, 128, 1000)


@pytest.mark.parametrize(("sizes", "steps"), [(BLOCK_EDGES, (1, 7, 64, 100, 65536)), ((1 << 20,), (4097, 1 << 20))])
def test_sha256_is_hashlibs(
    programs: dict[str, Program], tmp_path: pathlib.Path, sizes: tuple[int, ...], steps: tuple[int, ...]
) -> None:
    assert_is_hashlibs(programs["sha256"], tmp_path, sizes, steps)


def test_sha256_is_hashlibs_on_arm64(tmp_path: pathlib.Path) -> None:
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if shutil.which(compiler) is None or shutil.which(emulator) is None:
        pytest.skip(f"{compiler} or {emulator} is not installed: apt install g++-aarch64-linux-gnu qemu-user")
    path = compiled("sha256", tmp_path, compiler, "-march=armv8-a", "-static")
    program = Program((emulator, str(path)))
    assert program()[1].split() == ["armv8_sha2", "portable"]
    assert_is_hashlibs(program, tmp_path, (0, 55, 56, 64, 65, 1000, 1 << 16), (100, 65536))


def draw(program: Program, file: pathlib.Path, temperature: float, top_k: int, top_p: float, seed: int) -> np.ndarray:
    status, text = program(file, temperature, top_k, top_p, seed, DRAWS)
    assert status == 0, text
    return np.array(text.split(), dtype=int)


def expected_probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """[vocab], by the definition: sort all, cut at k, renormalise, cut where the sum reaches p, renormalise."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    kept = order[:top_k] if top_k else order
    weights = np.exp((logits[kept] - logits.max()) / temperature)
    weights /= weights.sum()
    nucleus = int(np.searchsorted(np.cumsum(weights), top_p)) + 1 if top_p < 1 else len(kept)
    probabilities = np.zeros(len(logits))
    probabilities[kept[:nucleus]] = weights[:nucleus] / weights[:nucleus].sum()
    return probabilities


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.6, 5, 1.0), (1.0, 0, 0.9), (1.3, 40, 0.6), (1.0, 1000, 0.5), (0.5, 0, 0.01)],
)
def test_sampling_follows_the_definition(
    programs: dict[str, Program], tmp_path: pathlib.Path, temperature: float, top_k: int, top_p: float
) -> None:
    logits = np.random.default_rng(0).normal(0, 2, 300).astype(np.float32)
    file = write(tmp_path, "\n".join(repr(float(value)) for value in logits))
    counts = np.bincount(draw(programs["sampler"], file, temperature, top_k, top_p, 7), minlength=300)
    probabilities = expected_probabilities(logits.astype(np.float64), temperature, top_k, top_p)
    assert counts[probabilities == 0].sum() == 0
    likely = probabilities * DRAWS >= 5  # the rest share a bin, as a chi-square test wants it
    expected = np.append(probabilities[likely], probabilities[~likely].sum()) * DRAWS
    observed = np.append(counts[likely], counts[~likely].sum())
    used = expected > 0
    freedom = max(int(used.sum()) - 1, 1)
    chi_square = float(((observed - expected)[used] ** 2 / expected[used]).sum())
    assert chi_square <= freedom + CHI_SQUARE_DEVIATIONS * np.sqrt(2 * freedom)


def test_a_seed_gives_its_sequence_again(programs: dict[str, Program], tmp_path: pathlib.Path) -> None:
    file = write(tmp_path, " ".join(["0"] * 50))
    first, again, other = (draw(programs["sampler"], file, 1.0, 0, 1.0, seed) for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).mean() > 0.9


def test_equal_logits_rank_by_id(programs: dict[str, Program], tmp_path: pathlib.Path) -> None:
    file = write(tmp_path, "0 2 1 2 2 0")
    assert set(draw(programs["sampler"], file, 0.0, 0, 1.0, 0)) == {1}
    assert set(draw(programs["sampler"], file, 1.0, 2, 1.0, 0)) == {1, 3}


@pytest.mark.parametrize(("logits", "said"), [("0 nan 1", "token 1 is NaN"), ("0 inf", "infinite"), ("-inf", "above")])
def test_logits_that_are_no_numbers(
    programs: dict[str, Program], tmp_path: pathlib.Path, logits: str, said: str
) -> None:
    for temperature in (0.0, 1.0):
        status, message = programs["sampler"](write(tmp_path, logits), temperature, 0, 1.0, 0, 1)
        assert status == 1
        assert said in message


def test_an_impossible_token_is_never_drawn(programs: dict[str, Program], tmp_path: pathlib.Path) -> None:
    file = write(tmp_path, "-inf 0 -inf 0")
    assert set(draw(programs["sampler"], file, 5.0, 0, 1.0, 1)) == {1, 3}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "said"),
    [
        (-1, 0, 1, "temperature is -1"),
        ("nan", 0, 1, "temperature is nan"),
        (1, -1, 1, "top_k is -1"),
        (1, 0, 0, "top_p is 0"),
        (1, 0, 1.5, "top_p is 1.5"),
    ],
)
def test_options_out_of_range(
    programs: dict[str, Program], tmp_path: pathlib.Path, temperature: object, top_k: int, top_p: float, said: str
) -> None:
    status, message = programs["sampler"](write(tmp_path, "0 1"), temperature, top_k, top_p, 0, 1)
    assert status == 1
    assert message.startswith(said)
