"""The check before a bundle gets its name: the written program, loaded by the real runtime, against the eager model."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from edgerun.bundle import Bundle, GoldenCase
from edgerun.checkpoint import Progress
from edgerun.errors import ParityError
from edgerun.evaluation import fidelity
from edgerun.sessions.text import TextSession


def verify(bundle: Bundle, progress: Progress | None = None) -> dict[str, Any]:
    """Run every golden case of `bundle` and return the parity that the manifest records, by case.

    Raises ParityError when a case misses the tolerance table.
    """
    recipe = bundle.recipe
    session = TextSession(bundle.path, verify=False)
    parity: dict[str, Any] = {}
    cases = bundle.golden_cases()
    noise = fidelity.Noise.from_manifest(bundle.manifest)
    for done, (entry, case) in enumerate(zip(bundle.manifest["golden"], cases, strict=True)):
        name = pathlib.PurePosixPath(entry["file"]).stem
        logits, sparse = _run(session, case, recipe.prefill_slice)
        found = fidelity.measure(logits, case.logits)
        failed = [one for one in fidelity.checks(found, recipe, sparse=sparse, noise=noise) if not one.passed]
        if failed:
            one = failed[0]
            raise ParityError(
                f"the program is not the model: on golden case {name}, {one.name} is {one.measured:.3g}, its limit is "
                f"{one.limit:.3g}; nothing was published. Report it with the model's config.json"
            )
        parity[name] = {key: value for key, value in dataclasses.asdict(found).items() if key != "divergence"}
        if progress is not None:
            progress("verify", (done + 1) / len(cases))
    return parity


def _run(session: TextSession, case: GoldenCase, prefill_slice: int) -> tuple[np.ndarray, bool]:
    """Logits as GoldenCase has them, and whether any call attended less than everything."""
    prompt, forced = case.prompt.tolist(), case.forced.tolist()
    session.reset()
    sparse = False
    rows: list[np.ndarray] = []
    for start in range(0, len(prompt), prefill_slice):
        row = session.forward(prompt[start : start + prefill_slice], start)
        sparse = sparse or session.stats.attended_pairs < session.stats.causal_pairs
    rows.append(row)
    for offset, token in enumerate(forced):
        rows.append(session.forward([token], len(prompt) + offset))
        sparse = sparse or session.stats.attended_pairs < session.stats.causal_pairs
    return np.stack(rows), sparse
