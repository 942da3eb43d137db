"""One selection for several tokens of decode: `reselect` as csrc/ops/dhsa_attention/dhsa_attention.h defines it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from edgerun import compare
from edgerun.errors import EdgerunError, ExportError
from edgerun.ops import dhsa_attention as op
from edgerun.ops.dhsa_attention import AttentionOptions, AttentionState, Pooling, Selector
from edgerun.ops.native import native_module
from edgerun.recipe import MICRO_BLOCK, DhsaOptions
from tests.ops.attention_cases import IMPLEMENTATIONS, Case, Implementation, Lists, both, make_case, small_options

PROMPT, STEPS, EVERY = 700, 40, 4
SELECTION = {"budget": 220, "tile": 16, "sink": 16, "pooling": Pooling.MOMENTS, "refine": 4, "reselect": EVERY}


def decode_case(**changes: object) -> Case:
    return make_case(small_options(**(SELECTION | changes)), PROMPT + STEPS, seed=5)


def fresh_lists(
    implementation: Implementation, case: Case, state: AttentionState, at: int, every: int = EVERY
) -> tuple[Lists, int]:
    """A selection for the token at `at` by the op without `reselect`, from a budget that leaves room for those after
    it; and the first micro-block of what is attended whatever is chosen, known from the boundaries."""
    options = dataclasses.replace(case.options, reselect=1, budget=case.options.budget - (every - 1))
    lists = implementation.lists(case.query[:, :, at : at + 1], state, at, options)
    decided = state.boundaries[: (at - 12) // MICRO_BLOCK + 1]
    return [[list(head[0])] for head in lists], int(decided.nonzero().max())


def continued(first: Lists, local: int, at: int) -> Lists:
    """The lists of a later token: what was chosen before `local`, and everything from there on."""
    return [[[b for b in head[0] if b < local] + list(range(local, at // MICRO_BLOCK + 1))] for head in first]


@both
@pytest.mark.parametrize("selector", Selector)
def test_a_selection_serves_so_many_tokens(implementation: Implementation, selector: Selector) -> None:
    case = decode_case(selector=selector, refine=4 if selector == Selector.CHUNK else 0)
    state = case.new_state()
    implementation.run(case, 0, PROMPT, state)
    anew = 0
    for at in range(PROMPT, PROMPT + STEPS):
        out = implementation.run(case, at, at + 1, state)
        if (at - PROMPT) % EVERY == 0:
            first, local = fresh_lists(implementation, case, state, at)
        query = case.query[:, :, at : at + 1]
        expected = continued(first, local, at)
        assert implementation.lists(query, state, at, case.options) == expected
        assert torch.equal(out, implementation.attend(query, state, at, case.options, expected))
        held = at + 1 - local * MICRO_BLOCK + MICRO_BLOCK * len([b for b in expected[0][0] if b < local])
        assert held <= case.options.budget
        anew += expected != fresh_lists(implementation, case, state, at)[0]
    if selector == Selector.CHUNK:
        assert anew > STEPS // 4  # a selection of its own would often have been another: the kept one was really used


def test_native_and_reference_agree() -> None:
    case = decode_case()
    states = {name: case.new_state() for name in IMPLEMENTATIONS}
    outputs = {}
    for at in [0, *range(PROMPT, PROMPT + STEPS)]:
        for name, implementation in IMPLEMENTATIONS.items():
            outputs[name] = implementation.run(case, at, max(PROMPT, at + 1), states[name])
        error = compare.relative_l2(outputs["native"], outputs["reference"])
        assert error <= compare.tolerance("op_against_op_fp32")
    assert torch.equal(states["native"].selection, states["reference"].selection)


@both
@pytest.mark.parametrize("between", ["a step back", "the same token", "a prompt", "a token left out"])
def test_any_other_call_selects_anew(implementation: Implementation, between: str) -> None:
    case = decode_case(reselect=16)
    state = case.new_state()
    implementation.run(case, 0, PROMPT, state)
    for at in range(PROMPT, PROMPT + 8):
        implementation.run(case, at, at + 1, state)
    at = PROMPT + 8
    if between == "a step back":
        at = PROMPT + 3
    elif between == "the same token":
        at = PROMPT + 7
    elif between == "a prompt":  # it ends where the kept list would go on
        implementation.run(case, PROMPT + 2, PROMPT + 8, state)
    else:
        state.selection[:, 0] -= 1
    implementation.run(case, at, at + 1, state)
    lists = implementation.lists(case.query[:, :, at : at + 1], state, at, case.options)
    assert lists == fresh_lists(implementation, case, state, at, every=16)[0]
    assert state.selection[0, :2].tolist() == [at, 15]


def test_threads_change_nothing() -> None:
    case = decode_case()
    outputs = []
    for threads in (1, 3):
        state = case.new_state()
        op.attend(*case.rows(0, PROMPT), state, torch.tensor([0]), case.options)
        for at in range(PROMPT, PROMPT + 10):
            rows = [part.contiguous() for part in case.rows(at, at + 1)]
            out = torch.empty(1, 1, *case.query.shape[1::2])
            op.prepare_call(*rows, out, state, at, case.options, threads)()
            outputs.append(out)
    assert all(torch.equal(a, b) for a, b in zip(outputs[:10], outputs[10:], strict=True))


@pytest.mark.parametrize(
    ("header", "ids"),
    [
        ((900, 8, 3), "ascending"),
        ((20, -1, 3), "ascending"),
        ((40, 14, 3), "ascending"),  # a count above the budget's micro-blocks, which ends in the next head's row
        ((20, 300, 3), "ascending"),
        ((0, 3, 3), "ascending"),
        ((40, 3, 4), "ascending"),  # more calls than a selection serves
        ((40, 13, 3), "ascending"),  # with the sink and what came since above the budget
        ((40, 3, 3), "far"),
        ((40, 3, 3), "equal"),
    ],
)
def test_memory_that_is_no_list_is_not_followed(header: tuple[int, int, int], ids: str) -> None:
    """The position is right by chance; L / 16, the count, the calls left or the ids are not."""
    case = decode_case()
    state = case.new_state()
    op.attend(*case.rows(0, PROMPT), state, torch.tensor([0]), case.options)
    local, count, left = header
    state.selection[:, :4] = torch.tensor([PROMPT - 1, left, local, count])
    room = state.selection.shape[1] - 4
    kinds = {
        "ascending": torch.arange(2, 2 + room),
        "far": torch.full((room,), 60_000),
        "equal": torch.full((room,), 5),
    }
    state.selection[:, 4:] = kinds[ids].int()
    out = op.attend(*case.rows(PROMPT, PROMPT + 1), state, torch.tensor([PROMPT]), case.options)
    query = case.query[:, :, PROMPT : PROMPT + 1]
    lists = fresh_lists(IMPLEMENTATIONS["native"], case, state, PROMPT)[0]
    assert torch.equal(out, op.native_attend(query, state, PROMPT, case.options, lists)[0])


def test_dense_and_windowed_calls_keep_nothing() -> None:
    case = decode_case(budget=0)
    assert case.new_state().selection.shape == (2, 0)
    assert AttentionOptions(scale=1.0, window=64, budget=400, reselect=4).keeps_selection is False
    within = decode_case()
    state = within.new_state()
    for at in range(120):  # within the budget: dense
        op.attend(*within.rows(at, at + 1), state, torch.tensor([at]), within.options)
    assert state.selection[:, 0].tolist() == [-2, -2]


def test_settings_out_of_range() -> None:
    with pytest.raises(EdgerunError, match="reselect is 0 tokens; it must be at least 1"):
        AttentionOptions(scale=1.0, reselect=0)
    with pytest.raises(EdgerunError, match=r"budget is 156 tokens, below its minimum of 163 .* reselect 8 - 1\)"):
        AttentionOptions(scale=1.0, budget=156, reselect=8)
    with pytest.raises(ExportError, match="reselect is 0 tokens"):
        DhsaOptions(reselect=0)
    with pytest.raises(ExportError, match=r"below its minimum of 163 .*--reselect"):
        DhsaOptions(budget=156, reselect=8)


def test_a_state_without_room_for_the_list() -> None:
    case = decode_case()
    state = dataclasses.replace(case.new_state(), selection=torch.zeros(2, 5, dtype=torch.int32))
    with pytest.raises(EdgerunError, match=r"selection is \[2, 5\], expected \[2, 17\]"):
        op.attend(*case.rows(0, PROMPT), state, torch.tensor([0]), case.options)


def test_targets_without_custom_ops_refuse_it() -> None:
    case = decode_case()
    state = case.new_state()
    with pytest.raises(EdgerunError, match="select for every token"):
        op.decomposition(*case.rows(0, 8), *state.tensors()[:4], torch.tensor([0]), case.options)


@pytest.mark.parametrize("variant", native_module().dhsa_variants())
def test_every_variant_keeps_the_same_list(variant: str) -> None:
    case = decode_case()
    native = native_module()
    native.dhsa_use_variant(variant)
    try:
        state = case.new_state()
        op.attend(*case.rows(0, PROMPT), state, torch.tensor([0]), case.options)
        op.attend(*case.rows(PROMPT, PROMPT + 1), state, torch.tensor([PROMPT]), case.options)
        kept = state.selection.clone()
        op.attend(*case.rows(PROMPT + 1, PROMPT + 2), state, torch.tensor([PROMPT + 1]), case.options)
    finally:
        native.dhsa_use_variant(native.dhsa_variants()[0])
    assert kept[0, :2].tolist() == [PROMPT, EVERY - 1]
    assert state.selection[0, :2].tolist() == [PROMPT + 1, EVERY - 2]
    assert torch.equal(kept[:, 2:], state.selection[:, 2:])
