"""The operator profile: what a traced run of a small bundle says, and what the events of one call add up to."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

from bench.workloads import operator_profile
from bench.workloads.operator_profile import BETWEEN, UNATTRIBUTED, MethodCall, group, instruction_names
from tests.shared_bundle import BUDGET, RECIPE, SharedBundle, shared_bundle

LENGTH = 150  # tokens: beyond the budget, and in two full slices and a part of one
SLICES = 3
LAYERS = 2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> SharedBundle:
    assert LENGTH > BUDGET and (SLICES - 1) * RECIPE.prefill_slice < LENGTH < SLICES * RECIPE.prefill_slice
    return shared_bundle(tmp_path_factory, "text", RECIPE)


def profiled(bundle: pathlib.Path, output: pathlib.Path, *options: str) -> list[dict]:
    sizes = ["--length", str(LENGTH), "--new-tokens", "3", "--threads", "1"]
    operator_profile.main([str(bundle), *sizes, "--output", str(output), *options])
    rows: list[dict] = json.loads(output.read_text())["rows"]
    return rows


def test_every_instruction_of_both_parts_is_counted(bundle: SharedBundle, tmp_path: pathlib.Path) -> None:
    prefill, decode = profiled(bundle.path, tmp_path / "results.json")
    assert (prefill["kind"], prefill["method_calls"]) == ("prefill", SLICES)
    assert (decode["kind"], decode["method_calls"]) == ("decode", 2)
    for row in (prefill, decode):
        operators = {one["name"]: one for one in row["operators"]}
        calls = row["method_calls"]
        assert operators["edgerun::dhsa_attention.out"]["calls"] == LAYERS * calls
        assert operators["edgerun::rms_norm.out"]["calls"] == (2 * LAYERS + 1) * calls
        assert operators["XNNPACK Fully Connected (NC, F32) GEMM"]["calls"] >= 7 * LAYERS * calls
        assert all(len(one["ms"]) == calls for one in operators.values())


def test_the_parts_add_up_to_the_whole(bundle: SharedBundle, tmp_path: pathlib.Path) -> None:
    for row in profiled(bundle.path, tmp_path / "results.json"):
        assert sum(one["total_ms"] for one in row["operators"]) == pytest.approx(row["execute_ms"])
        assert sum(one["share"] for one in row["operators"]) == pytest.approx(1.0)
        assert sum(row["share_of_group"].values()) == pytest.approx(1.0)


def test_a_row_that_is_there_is_not_measured_again(
    bundle: SharedBundle, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = profiled(bundle.path, tmp_path / "results.json")
    monkeypatch.setattr(operator_profile, "measure", None)
    assert profiled(bundle.path, tmp_path / "results.json") == rows


def test_other_tokens_than_the_session_gives_are_no_profile(
    bundle: SharedBundle, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = operator_profile.session_run

    def other(path: pathlib.Path, plan: operator_profile.Plan) -> operator_profile.Run:
        given = run(path, plan)
        return dataclasses.replace(given, tokens=[*given.tokens[:-1], given.tokens[-1] + 1])

    monkeypatch.setattr(operator_profile, "session_run", other)
    with pytest.raises(SystemExit, match="the traced program gives other tokens than the session"):
        profiled(bundle.path, tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()


def test_a_prompt_beyond_the_context_is_refused(bundle: SharedBundle, tmp_path: pathlib.Path) -> None:
    with pytest.raises(SystemExit, match=r"254 \+ 3 tokens do not fit the context of 256"):
        profiled(bundle.path, tmp_path / "results.json", "--length", "254")


def test_instructions_have_the_names_of_the_program(bundle: SharedBundle) -> None:
    names = instruction_names(bundle.path / "programs" / "text.pte")
    assert names.count("edgerun::dhsa_attention.out") == LAYERS
    assert {"XnnpackBackend", "edgerun::embedding_lookup.out"} <= set(names)


@dataclasses.dataclass(frozen=True)
class Event:
    name: str | None
    end_time: int
    instruction_id: int = 0
    delegate_debug_id_str: str | None = None
    start_time: int = 0


def test_time_within_a_delegate_is_counted_once() -> None:
    events = [
        Event("native_call_add.out", 8),  # inside the next
        Event("OPERATOR_CALL", 10),
        Event(None, 20, 1, "Add (ND) #1"),
        Event(None, 30, 1, "Add (ND) #2"),
        Event("DELEGATE_CALL", 57, 1),
        Event("Method::execute", 70),
    ]
    call = MethodCall(events, ["aten::add.out", "XnnpackBackend"])
    assert dict(call.ns) == {"aten::add.out": 10, "XNNPACK Add (ND)": 50, UNATTRIBUTED: 7, BETWEEN: 3}
    assert call.count["XNNPACK Add (ND)"] == 2
    assert sum(call.ns.values()) == call.execute_ns == 70


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("edgerun::dhsa_attention.out", "attention"),
        ("edgerun::embedding_logits.out", "products"),
        ("XNNPACK Fully Connected (NC, QDU8, F32, QB4W) GEMM", "products"),
        ("XNNPACK Multiply (ND)", "other"),
        ("edgerun::rms_norm.out", "other"),
    ],
)
def test_what_an_operator_counts_for(name: str, expected: str) -> None:
    assert group(name) == expected
