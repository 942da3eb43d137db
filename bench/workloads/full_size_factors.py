"""What LPL, TDTM and block streaming gain one by one and together, computed from the runs of full_size_video.py.

    expected = evaluations of plain steps / with LPL  x  plain step / merged step  x  streaming by the formula

The denoiser's short run is measured end to end: all its steps plain, one block after another, without blocks that stay,
over the same run with all three techniques; the ratio is of the walls of the whole stage, first passes included, which
measure the blocks in turn and gain nothing by streaming. Each factor is of its technique alone: steps are compared with
all blocks in memory, and the formula has l, e and alpha of plain steps (l, e: in turn; d: of the run with all
techniques). So what is checked is that the gains multiply. That holds while a merged block still executes longer than
one loads; where it does not, TDTM makes no step shorter, and the product is out of reach.

Alpha is solved from plain steps that load ahead: where the limit leaves no room for that, from those within a larger
one. So the formula states what streaming would gain, and a run that has no room for it falls short of the product.
Steps of a run are taken by their median, without the first.

From the same steps the whole run of the quality tables is extrapolated, and set against the paper's. Times in
milliseconds.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from bench.harness import Row
from bench.workloads.streaming_formula import gain_ms, means_of_a_block, solve_alpha_ms

PLAIN_RESIDENT = "plain steps, all resident"
MERGED_RESIDENT = "all together, all resident"
IN_TURN = "plain steps, one block after another"
STREAMED = "plain steps"
ROOMY = "plain steps, with more memory"
TOGETHER = "all together"
_NEEDED = (PLAIN_RESIDENT, MERGED_RESIDENT, IN_TURN, STREAMED, ROOMY, TOGETHER)

LEAST_REACHED = 0.9  # of the expected ratio
LEAST_TDTM = 1.1  # averaged over the steps of a whole run
# arXiv 2502.04363: seconds of the denoiser on an iPhone 15 Pro, 256 x 256, 68 frames. 16 of 30 evaluations; the plain
# run is what both of its tables imply.
_PAPER_PLAIN_S = 1061.0
PAPER = {
    "evaluations_ratio": _PAPER_PLAIN_S / 573.9,
    "tdtm_ratio": _PAPER_PLAIN_S / 965.4,
    "streaming_ratio": _PAPER_PLAIN_S / 947.7,
    "ratio": _PAPER_PLAIN_S / 454.5,
}
_NAMES = {"evaluations_ratio": "evaluations", "tdtm_ratio": "TDTM", "streaming_ratio": "streaming, by formula"}


@dataclasses.dataclass(frozen=True)
class WholeRun:
    """The run that is extrapolated to; evaluations and merge_steps are what the quality tables decide."""

    steps: int = 30
    evaluations: int = 19  # instead of as many as steps, by a leap or by a sampler that needs fewer steps
    merge_steps: int = 15  # first steps with merged frames, by default

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that are of no run."""
        if not (1 <= self.evaluations <= self.steps and 0 <= self.merge_steps <= self.steps):
            raise ValueError(
                f"{self.evaluations} evaluations and {self.merge_steps} merged steps of {self.steps}: both are at most "
                "the steps, and evaluations 1 at least"
            )

    def tdtm_ratio(self, plain: float, merged: float, evaluations: int) -> float:
        """How many times shorter `evaluations` steps are with the first merge_steps of them merged."""
        count = min(self.merge_steps, evaluations)
        return evaluations * plain / (count * merged + (evaluations - count) * plain)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and most of them."""
    return {
        "median_ms": statistics.median(values),
        "minimum_ms": min(values),
        "maximum_ms": max(values),
        "count": len(values),
    }


def _later_steps(row: Row) -> dict[str, Any]:
    """The spread of a run's steps without the first, which loads what stays and measures."""
    return spread([step["wall_ms"] for step in row["steps"][1:]])


def denoiser_rows(runs: list[Row], whole: WholeRun) -> list[Row]:
    """The rows `factors`, `tdtm` and `whole_run`; none while a run is missing, ended badly, or none loads ahead."""
    by_case = {row["case"]: row for row in runs if "steps" in row}
    if not all(name in by_case for name in _NEEDED):
        return []
    found = factors(by_case)
    if found is None:
        return []
    return [found, tdtm(found, whole), whole_run(found, by_case, whole)]


def factors(by_case: dict[str, Row]) -> Row | None:
    """The short run: what was gained together, and what the factors make of it; None where no run loads ahead."""
    turn, together = by_case[IN_TURN], by_case[TOGETHER]
    overlapped = next((name for name in (STREAMED, ROOMY) if by_case[name]["prefetch"] > 0), None)
    if overlapped is None:
        return None
    steps = {name: _later_steps(by_case[name]) for name in _NEEDED}
    blocks = len(turn["blocks"])
    load, execute = means_of_a_block(turn["blocks"])
    in_turn = blocks * (load + execute)
    gained = in_turn - steps[overlapped]["median_ms"]
    alpha = solve_alpha_ms(blocks, by_case[overlapped]["resident_blocks"], load, execute, gained)
    gain = gain_ms(blocks, together["resident_blocks"], load, execute, alpha)
    ratios = {
        "evaluations_ratio": turn["evaluations"] / together["evaluations"],
        "tdtm_ratio": steps[PLAIN_RESIDENT]["median_ms"] / steps[MERGED_RESIDENT]["median_ms"],
        "streaming_ratio": in_turn / (in_turn - gain),
    }
    expected = math.prod(ratios.values())
    measured = turn["stage_wall_ms"] / together["stage_wall_ms"]
    return {
        "kind": "factors",
        "blocks": blocks,
        "resident_blocks": together["resident_blocks"],
        "prefetch": together["prefetch"],
        "alpha_from": overlapped,
        "memory_limit_bytes_of_alpha": by_case[overlapped].get("memory_limit_bytes"),
        "resident_blocks_of_alpha": by_case[overlapped]["resident_blocks"],
        "resident_blocks_in_turn": turn["resident_blocks"],
        "load_of_a_block_ms": load,
        "execute_of_a_block_ms": execute,
        "alpha_ms": alpha,
        "gain_ms": gain,
        "in_turn_ms": in_turn,
        "evaluations": [turn["evaluations"], together["evaluations"]],
        "stage_wall_ms": [turn["stage_wall_ms"], together["stage_wall_ms"]],
        "later_steps": steps,
        "first_step_ms": together["steps"][0]["wall_ms"],
        **ratios,
        "expected_ratio": expected,
        "ratio": measured,
        "reached_share": measured / expected,
    }


def tdtm(found: Row, whole: WholeRun) -> Row:
    """What TDTM alone gains over a whole run, by the number of merged steps. found: the row `factors`."""
    plain, merged = (found["later_steps"][name]["median_ms"] for name in (PLAIN_RESIDENT, MERGED_RESIDENT))

    def average(count: int) -> float:
        return dataclasses.replace(whole, merge_steps=count).tdtm_ratio(plain, merged, whole.steps)

    needed = next((count for count in range(whole.steps + 1) if average(count) >= LEAST_TDTM), None)
    reached = average(whole.merge_steps)
    if reached >= LEAST_TDTM:
        verdict = f"{whole.merge_steps} merged steps are enough for {LEAST_TDTM:.2f}"
    elif needed is not None:
        verdict = f"{whole.merge_steps} merged steps are not enough for {LEAST_TDTM:.2f}: it takes {needed}"
    else:
        verdict = f"not even {whole.steps} merged steps reach {LEAST_TDTM:.2f}, but {average(whole.steps):.2f}"
    return {
        "kind": "tdtm",
        "steps": whole.steps,
        "merge_steps": whole.merge_steps,
        "average_ratio": reached,
        "merge_steps_needed": needed,
        "curve": [[count, average(count)] for count in range(whole.steps + 1)],
        "verdict": verdict,
    }


def whole_run(found: Row, by_case: dict[str, Row], whole: WholeRun) -> Row:
    """The run of the quality tables, extrapolated from the steps that were measured. found: the row `factors`."""
    later = {name: found["later_steps"][name]["median_ms"] for name in _NEEDED}
    merged = min(whole.merge_steps, whole.evaluations)
    first = by_case[TOGETHER if merged > 0 else STREAMED]["steps"][0]["wall_ms"]
    rest = [later[TOGETHER]] * merged + [later[STREAMED]] * (whole.evaluations - merged)
    sequential, together = whole.steps * later[IN_TURN], first + sum(rest[1:])
    ratios = {
        "evaluations_ratio": whole.steps / whole.evaluations,
        "tdtm_ratio": whole.tdtm_ratio(later[PLAIN_RESIDENT], later[MERGED_RESIDENT], whole.evaluations),
        "streaming_ratio": found["streaming_ratio"],
    }
    expected = math.prod(ratios.values())
    return {
        "kind": "whole_run",
        **dataclasses.asdict(whole),
        "sequential_ms": sequential,
        "together_ms": together,
        **ratios,
        "expected_ratio": expected,
        "ratio": sequential / together,
        "reached_share": sequential / together / expected,
        "paper": PAPER,
        "missing_to_paper": PAPER["ratio"] / (sequential / together),
    }


def text_encoder_rows(runs: list[Row], counts: Sequence[int]) -> list[Row]:
    """The row `formula` of each number of tokens whose runs, one pass each, are there.

    No block stays from a pass before, so that d is 0 and alpha is solved from the row: it checks nothing. What the
    alpha of the first number of tokens makes of the others is set beside what was gained.
    """
    by_case = {row["case"]: row for row in runs if "blocks" in row}
    found: list[Row] = []
    for count in counts:
        turn, streamed = by_case.get(f"{count} tokens, no prefetch"), by_case.get(f"{count} tokens")
        if turn is None or streamed is None:
            continue
        blocks = len(turn["blocks"])
        load, execute = means_of_a_block(turn["blocks"])
        in_turn = blocks * (load + execute)
        gained = in_turn - streamed["passes_wall_ms"]
        row = {
            "kind": "formula",
            "tokens": count,
            "blocks": blocks,
            "resident_blocks": 0,
            "load_of_a_block_ms": load,
            "execute_of_a_block_ms": execute,
            "alpha_ms": solve_alpha_ms(blocks, 0, load, execute, gained),
            "in_turn_ms": in_turn,
            "gain_ms": gained,
        }
        if found:
            by_first = gain_ms(blocks, 0, load, execute, found[0]["alpha_ms"])
            row |= {"gain_by_first_alpha_ms": by_first, "off_share": abs(gained - by_first) / in_turn}
        found.append(row)
    return found


def lines(row: Row) -> str:
    """A row of this file, to read."""
    return {"factors": _factors, "tdtm": _tdtm, "whole_run": _whole_run, "formula": _formula}[row["kind"]](row)


def _seconds(of: dict[str, Any]) -> str:
    low, middle, high = (of[f"{name}_ms"] / 1e3 for name in ("minimum", "median", "maximum"))
    return f"{middle:.2f} s ({low:.2f} to {high:.2f}, {of['count']} steps)"


def _factors(row: Row) -> str:
    evaluations, walls = row["evaluations"], [wall / 1e3 for wall in row["stage_wall_ms"]]
    steps = (f"    a step, {name}: {_seconds(of)}" for name, of in row["later_steps"].items())
    return "\n".join(
        [
            f"  {evaluations[0]} plain steps of one block after another take {walls[0]:.1f} s, the same run with all "
            f"together {walls[1]:.1f} s: {row['ratio']:.2f} times as fast",
            *steps,
            f"    {row['blocks']} blocks, {row['resident_blocks']} resident, {row['prefetch']} loaded ahead; l "
            f"{row['load_of_a_block_ms']:.0f} ms, e {row['execute_of_a_block_ms']:.0f} ms, alpha {row['alpha_ms']:.0f} "
            f"ms (of {row['alpha_from']!r}); r {row['gain_ms']:.0f} of {row['in_turn_ms']:.0f} ms",
            f"    evaluations {row['evaluations_ratio']:.3f} x TDTM {row['tdtm_ratio']:.3f} x streaming "
            f"{row['streaming_ratio']:.3f} = {row['expected_ratio']:.3f}: {100 * row['reached_share']:.0f} % of it is "
            f"reached, with a first step in turn of {row['first_step_ms'] / 1e3:.1f} s",
        ]
    )


def _tdtm(row: Row) -> str:
    curve = ", ".join(f"{count}: {ratio:.3f}" for count, ratio in row["curve"] if count % 5 == 0)
    return (
        f"  TDTM alone, {row['merge_steps']} of {row['steps']} steps merged: {row['average_ratio']:.3f} times as fast; "
        f"{row['verdict']}\n    by merged steps: {curve}"
    )


def _whole_run(row: Row) -> str:
    factors = [
        f"    {text:<22} {row[name]:.2f}, the paper {row['paper'][name]:.2f}: {row['paper'][name] / row[name]:.2f} "
        "times as much"
        for name, text in _NAMES.items()
    ]
    return "\n".join(
        [
            f"  extrapolated: {row['steps']} plain steps of one block after another {row['sequential_ms'] / 1e3:.0f} "
            f"s, {row['evaluations']} evaluations with {row['merge_steps']} merged {row['together_ms'] / 1e3:.0f} s: "
            f"{row['ratio']:.2f} times as fast, {100 * row['reached_share']:.0f} % of {row['expected_ratio']:.2f}",
            *factors,
            f"    all together {row['ratio']:.2f}, the paper {row['paper']['ratio']:.2f}: "
            f"{row['missing_to_paper']:.2f} times as much",
        ]
    )


def _formula(row: Row) -> str:
    text = (
        f"  {row['tokens']} tokens: l {row['load_of_a_block_ms']:.0f} ms, e {row['execute_of_a_block_ms']:.0f} ms, "
        f"alpha {row['alpha_ms']:.0f} ms; r {row['gain_ms']:.0f} of {row['in_turn_ms']:.0f} ms"
    )
    if "off_share" in row:
        text += f"; by the first alpha {row['gain_by_first_alpha_ms']:.0f}, {row['off_share']:.2f} of it off"
    return text
