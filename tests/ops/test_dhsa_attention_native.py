"""The native op beyond the laws: each kernel variant against float64, refusals, registration, ExecuTorch's binding."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from edgerun import _library
from edgerun.compare import relative_l2, tolerance
from edgerun.errors import EdgerunError
from edgerun.ops import dhsa_attention as op
from edgerun.ops.dhsa_attention import AttentionOptions, AttentionState, Chunking, Pooling, QueryPooling, Selector
from edgerun.ops.native import native_module
from tests.ops.attention_cases import IMPLEMENTATIONS, Case, make_case, prefill

ROOT = Path(__file__).parents[2]
NATIVE = IMPLEMENTATIONS["native"]
VARIANTS = native_module().dhsa_variants()
BUFFER = torch.zeros(4096)  # room for any of the small calls below, should one not be refused
SPARSE = AttentionOptions(scale=0.125, budget=272, finds_boundaries=True)
KEEPING = dataclasses.replace(SPARSE, reselect=4)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    native_module().dhsa_use_variant(request.param)
    yield request.param
    native_module().dhsa_use_variant(VARIANTS[0])


def judge(case: Case, result: torch.Tensor, state: AttentionState) -> None:
    """Lists equal float64's but for near ties; outputs agree with float64 given the native lists."""
    truth = state.to(torch.float64)
    query = case.query.double()
    selection = op.reference_lists(query, truth, 0, case.options)
    lists = op.native_lists(case.query, state, 0, case.options)
    for judged, blocks in zip(itertools.chain(*selection), itertools.chain(*lists), strict=True):
        gap = op.tie_gap(judged, blocks)
        assert gap <= tolerance("selection_near_tie"), f"{blocks} for {judged.blocks}: gap {gap}"
    expected = op.reference_attend(query, truth, 0, case.options, lists)
    name = "op_fp16" if case.query.dtype == torch.float16 else "op_fp32"
    assert relative_l2(result.double().numpy(), expected.numpy()) <= tolerance(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128, 256])
def test_every_variant_agrees_with_float64_at_every_head_dim(variant: str, head_dim: int, dtype: torch.dtype) -> None:
    case = make_case(SPARSE, 600, kv_heads=2, group=4, head_dim=head_dim, dtype=dtype, seed=head_dim)
    result, state = prefill(NATIVE, case)
    judge(case, result, state)


@pytest.mark.parametrize("group", [1, 5, 8])
@pytest.mark.parametrize("changes", [{"window": 100, "budget": 0}, {"softcap": 2.0}, {"tile": 200, "budget": 400}])
def test_every_variant_agrees_with_float64_for_every_kind_of_layer(
    variant: str, group: int, changes: dict[str, float]
) -> None:
    case = make_case(SPARSE, 530, group=group, head_dim=64, seed=group).with_options(**changes)
    if case.options.budget == 0:
        case = case.with_options(finds_boundaries=False)
    result, state = prefill(NATIVE, case)
    judge(case, result, state)


def test_variants_leave_the_same_state() -> None:
    case = make_case(SPARSE, 500, head_dim=64, dtype=torch.float16)
    states = []
    for name in VARIANTS:
        native_module().dhsa_use_variant(name)
        states.append(prefill(NATIVE, case)[1])
    native_module().dhsa_use_variant(VARIANTS[0])
    for state in states[1:]:
        assert torch.equal(state.key_cache, states[0].key_cache)
        assert torch.equal(state.boundaries, states[0].boundaries)
        assert torch.equal(state.summaries, states[0].summaries)


def arguments(**changes: float) -> list[float]:
    """A valid positional call of `_native.dhsa_attention` on one token, with some arguments changed."""
    states = ("key_cache", "value_cache", "summaries", "boundaries", "selection")
    pointers = ("query", "key", "value", "out", *states)
    ones = ("tokens", "query_heads", "kv_heads", "head_dim")
    values: dict[str, float] = dict.fromkeys(pointers, BUFFER.data_ptr()) | dict.fromkeys(ones, 1)
    values |= {
        "capacity_blocks": 4,
        "input_pos": 0,
        "dtype": 0,
        "cache_dtype": 0,
        "scale": 1.0,
        "softcap": 0.0,
        "window": 0,
        "budget": 0,
    }
    values |= {"tile": 1, "sink": 0, "dense_tail": 0, "chunking": 0, "threshold": 0.0, "finds_boundaries": False}
    values |= {"pooling": 0, "query_pooling": 0, "selector": 0, "refine": 0, "reselect": 1, "threads": 1}
    return list((values | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "at least one token"),
        ({"tokens": 65}, "exceeds the cache"),
        ({"input_pos": 64}, "exceeds the cache"),
        ({"input_pos": -1}, "negative"),
        ({"query_heads": 3, "kv_heads": 2}, "multiple of the number of key/value heads"),
        ({"budget": 76}, "at least sink"),
        ({"sink": 8}, "multiple of 16"),
        ({"dtype": 2}, "float32 or float16"),
        ({"cache_dtype": 3}, "float32, float16 or int8"),
        ({"scale": float("nan")}, "scale is not finite"),
        ({"selector": 7}, "none of its values"),
        ({"refine": -1}, "number of channels"),
        ({"reselect": 0}, "at least 1 token"),
        ({"budget": 80, "reselect": 5}, r"at least sink \+ 64 \+ 12 \+ tile \+ reselect - 1 tokens"),
        ({"key_cache": 0}, "are all needed"),
        ({"budget": 200, "boundaries": 0}, "boundaries buffer"),
        ({"budget": 200, "summaries": 0}, "needs the summaries"),
        ({"budget": 200, "reselect": 2, "selection": 0}, "needs the selection buffer"),
    ],
)
def test_what_cannot_be_served_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native_module().dhsa_attention(*arguments(**changes))


def test_a_missing_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 33 arguments, not 32"):
        native_module().dhsa_attention(*arguments()[:-1])


@pytest.mark.parametrize("blocks", [[1, 0], [0, 0], [0, 4], [-1]])
def test_a_list_that_leaves_the_cache_is_refused(blocks: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend strictly"):
        native_module().dhsa_attend(*arguments(), [[blocks]])


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="no variant 'sve'"):
        native_module().dhsa_use_variant("sve")


class Layer(torch.nn.Module):
    """One attention layer with its state in buffers, as an exported program holds it."""

    def __init__(self, options: AttentionOptions, state: AttentionState) -> None:
        super().__init__()
        self.options = options
        for name in ("key_cache", "value_cache", "summaries", "boundaries", "selection"):
            self.register_buffer(name, getattr(state, name))

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, input_pos: torch.Tensor
    ) -> torch.Tensor:
        state = AttentionState(self.key_cache, self.value_cache, self.summaries, self.boundaries, self.selection)
        return op.attend(query, key, value, state, input_pos, self.options)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pte of one sparse layer: [1, 4, S, 16] queries on 2 KV heads, S up to 200."""
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    case = make_case(SPARSE, 200, head_dim=16)
    layer = Layer(KEEPING, AttentionState.allocate(2, 16, 512, KEEPING))
    tokens = torch.export.Dim("tokens", min=1, max=200)
    shapes = ({2: tokens}, {2: tokens}, {2: tokens}, None)
    exported = torch.export.export(layer, (*case.rows(0, 200), torch.tensor([0])), dynamic_shapes=shapes)
    lowered = to_edge_transform_and_lower(exported, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    path = tmp_path_factory.mktemp("program") / "layer.pte"
    with path.open("wb") as file:
        lowered.to_executorch().write_to_file(file)
    return path


def test_executorch_gives_the_bits_of_the_torch_op(program: Path) -> None:
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    _library.load_op_library()
    module = _load_for_executorch(str(program))
    case = make_case(KEEPING, 460, head_dim=16)
    state = case.new_state()
    for first, last in itertools.pairwise([0, 200, 337, *range(452, 461)]):
        got = module.run_method(
            "forward", (*(rows.contiguous() for rows in case.rows(first, last)), torch.tensor([first]))
        )
        assert torch.equal(got[0], NATIVE.run(case, first, last, state)), f"tokens {first} to {last}"


def test_executorch_refuses_a_position_beyond_the_cache(program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    _library.load_op_library()
    module = _load_for_executorch(str(program))
    case = make_case(SPARSE, 20, head_dim=16)
    with pytest.raises(RuntimeError):
        module.run_method("forward", (*(rows.contiguous() for rows in case.rows(0, 20)), torch.tensor([500])))
    logged = capfd.readouterr().err
    assert "exceeds the cache" in logged and "input_pos 500" in logged


IMPORTS = {  # ExecuTorch first is what the tests above do
    "edgerun first": "import edgerun._native; import executorch.extension.pybindings.portable_lib",
    "two copies": (
        "import executorch.extension.pybindings.portable_lib, ctypes, edgerun._native; "
        "ctypes.CDLL({copy!r}, mode=ctypes.RTLD_GLOBAL)"
    ),
}


@pytest.mark.parametrize("order", IMPORTS)
def test_ops_register_once_in_every_order(order: str, tmp_path: Path) -> None:
    copy = tmp_path / "libedgerun_ops.so"
    if "{copy" in IMPORTS[order]:  # ExecuTorch ends the process when a name is registered twice; ours must not
        library = _library.op_library_path()
        shutil.copy(library, copy)
    code = IMPORTS[order].format(copy=str(copy)) + (
        "; from executorch.extension.pybindings.portable_lib import _get_operator_names as names; "
        "print([n for n in names() if n.startswith('edgerun::dhsa')])"
    )
    environment = {"LD_LIBRARY_PATH": str(_library.executorch_library_folder()), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "['edgerun::dhsa_attention.out']"
    assert ("registered already" in done.stderr) == (order == "two copies")


def test_a_context_longer_than_its_ids_is_refused() -> None:
    with pytest.raises(EdgerunError, match="max_context"):
        AttentionState.allocate(1, 1, 16 * 65536 + 1, AttentionOptions(scale=1.0))


@pytest.mark.parametrize("kind", [Chunking, Pooling, QueryPooling, Selector], ids=lambda kind: kind.__name__)
def test_enums_match_the_header(kind: type[enum.IntEnum]) -> None:
    header = (ROOT / "csrc/ops/dhsa_attention/dhsa_attention.h").read_text()
    line = next(line for line in header.splitlines() if f"enum class {kind.__name__} :" in line)
    entries = dict(entry.split(" = ") for entry in line.split("{")[1].split("}")[0].strip().split(", "))
    numbers = {name.removeprefix("k").removeprefix("Query").upper(): int(value) for name, value in entries.items()}
    assert numbers == {member.name: member.value for member in kind}
