"""The model of the NEON loops reads assembly right: which loop is the hot one, what it multiplies, what it spills."""

from __future__ import annotations

import shutil

import pytest

from bench.ops import llvm_mca

ASSEMBLY = """
	.text
probe_score_rows:                       // @probe_score_rows
	ldr	q0, [x0]
	b	_ZN7edgerun10score_rowsILi1EEEvPKf.isra.0
_ZN7edgerun10score_rowsILi1EEEvPKf.isra.0:
.LBB0_1:                                // outer
	fmla	v9.4s, v1.4s, v2.4s
.LBB0_2:                                // inner
	ldr	q1, [sp, #16]
	fmla	v3.4s, v1.4s, v2.s[0]
	fmla	v4.4s, v1.4s, v2.4s
	cbnz	x3, .LBB0_2
	b.ne	.LBB0_1
.LBB0_3:
	add	x0, x0, #4
	b.ne	.LBB0_3
	ret
"""


def test_the_hot_loop_is_the_innermost_with_most_multiply_adds() -> None:
    loop = llvm_mca.hot_loop(ASSEMBLY, "score_rows")
    assert loop.products == 2 and len(loop.lines) == 4
    assert loop.spills == 1


def test_a_function_without_a_loop_is_said_to_have_none() -> None:
    with pytest.raises(llvm_mca.EdgerunError, match="no loop of weigh_rows"):
        llvm_mca.hot_loop(ASSEMBLY, "weigh_rows")


def test_the_flags_are_those_of_the_build() -> None:
    flags = llvm_mca.kernel_flags()
    assert "-O3" in flags and "-ffp-contract=fast" in flags and not any(flag.startswith("-W") for flag in flags)


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs g++-aarch64-linux-gnu")
@pytest.mark.parametrize("name", llvm_mca.VARIANTS)
def test_the_hot_loops_of_the_kernel_are_found(name: str) -> None:
    variant = llvm_mca.VARIANTS[name]
    text = llvm_mca.assembly(["aarch64-linux-gnu-g++"], variant)
    for function in llvm_mca.FUNCTIONS:
        assert llvm_mca.hot_loop(text, function, variant.product).products >= 16
