"""What streaming a chain's blocks gains over one block after another, and what of loading it hides.

    r = b min(l, e) + d max(0, l - e) - alpha (1 - d / b)      milliseconds gained a pass (arXiv 2502.04363 section 3.3)
    h = (sum of loads + sum of executions - wall) / min(sum of loads, sum of executions)

b blocks, of which d stay in memory; e: executing one; alpha: what loading and executing take from each other in a pass.
ours: l is loading a block and giving its memory back, since the thread that loads does both and a pass in turn waits
for both, b (l + e). h counts loads alone, so that giving memory back beside an execution is no merit.
"""

from __future__ import annotations

from typing import Any


def gain_ms(blocks: int, resident: int, load_ms: float, execute_ms: float, alpha_ms: float) -> float:
    """r, in milliseconds."""
    hidden = blocks * min(load_ms, execute_ms) + resident * max(0.0, load_ms - execute_ms)
    return hidden - alpha_ms * (1 - resident / blocks)


def solve_alpha_ms(blocks: int, resident: int, load_ms: float, execute_ms: float, gained_ms: float) -> float:
    """The alpha with which r is what was gained; 0 where every block stays, since nothing tells then."""
    streaming = 1 - resident / blocks
    return (gain_ms(blocks, resident, load_ms, execute_ms, 0.0) - gained_ms) / streaming if streaming > 0 else 0.0


def hidden_share(load_ms: float, execute_ms: float, wall_ms: float) -> float | None:
    """h; None where nothing was loaded or executed."""
    least = min(load_ms, execute_ms)
    return (load_ms + execute_ms - wall_ms) / least if least > 0 else None


def means_of_a_block(blocks: list[dict[str, Any]]) -> tuple[float, float]:
    """l and e from a report's blocks, each block counting once."""
    load = sum((block["load_ms"] + block["unload_ms"]) / block["loads"] for block in blocks)
    execute = sum(block["execute_ms"] / block["executions"] for block in blocks)
    return load / len(blocks), execute / len(blocks)
