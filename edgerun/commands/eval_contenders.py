"""Who answers in `edgerun eval`: bundles, checkpoints, and every selector at every budget."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from edgerun.commands.common import calibrated_recipe, checkpoint_path, recipe_from
from edgerun.errors import EdgerunError
from edgerun.evaluation.answers import Contender
from edgerun.recipe import Recipe
from edgerun.report import Check

if TYPE_CHECKING:
    from edgerun.bundle import Bundle


def budget_contenders(
    checkpoint: pathlib.Path,
    base: Recipe,
    budgets: Sequence[int],
    selectors: Sequence[str],
    predictor: pathlib.Path | None = None,
) -> list[Contender]:
    """Eager contenders: dense first, then every selector at every budget; predictor: a calibration file.

    Raises EdgerunError for an unknown selector, ExportError for a budget below its minimum, CheckpointError.
    """
    from edgerun.selectors.registry import OP_SELECTORS, split

    contenders = [eager_contender("dense", checkpoint, dataclasses.replace(base, attention="dense"))]
    for selector in selectors:
        if selector not in OP_SELECTORS:
            split(selector)
        for budget in budgets:
            dhsa = dataclasses.replace(base.dhsa, budget=budget, layers=())  # one budget and selector for all layers
            lab: str | None = selector
            if selector in OP_SELECTORS:
                dhsa, lab = dataclasses.replace(dhsa, selector=cast(Any, selector)), None
            recipe = dataclasses.replace(base, attention="dhsa", dhsa=dhsa)
            contenders.append(eager_contender(f"{selector} {budget}", checkpoint, recipe, lab, predictor))
    return contenders


def eager_contender(
    name: str,
    checkpoint: pathlib.Path,
    recipe: Recipe,
    selector: str | None = None,
    predictor: pathlib.Path | None = None,
) -> Contender:
    """An eager contender with its identity; predictor: a calibration file, which only counts where it is needed.

    Raises CheckpointError or ExportError when it cannot be served.
    """
    from edgerun.checkpoint import Checkpoint
    from edgerun.models.causal_lm import resolve
    from edgerun.selectors.registry import needs_predictor, revision

    opened = Checkpoint.open(checkpoint)
    resolved = resolve(opened.config, recipe)
    parts = [resolved.hash(opened.sha256())]
    if selector is not None:
        parts += [part for part in (selector, revision(selector)) if part]
        if needs_predictor(selector):
            parts.append(predictor_identity(predictor, opened.sha256()))
    return Contender(name, checkpoint, resolved, " ".join(parts), selector, predictor)


def predictor_identity(predictor: pathlib.Path | None, checkpoint_sha256: str) -> str:
    """What a build with a boundary predictor is known by. Raises EdgerunError without one, or for another model's."""
    from edgerun.calibration import Calibration

    if predictor is None:
        raise EdgerunError(
            "learned boundaries need a trained predictor: pass --predictor, a file of `edgerun calibrate`"
        )
    Calibration.open(predictor).require(checkpoint_sha256)
    return hashlib.sha256(predictor.read_bytes()).hexdigest()[:16]


def contenders_of(arguments: argparse.Namespace) -> tuple[list[Contender], tuple[Check, ...]]:
    """Who answers, and for a bundle answered by its checkpoint the checks that both agree."""
    from edgerun.bundle import MANIFEST, Bundle
    from edgerun.checkpoint import Checkpoint

    path = checkpoint_path(arguments.model)
    is_bundle = (path / MANIFEST).is_file() or path.suffix == ".edgerun"
    engine = arguments.engine or ("bundle" if is_bundle else "eager")
    _refuse_unused(arguments, is_bundle, engine)
    if engine == "bundle":
        if not is_bundle:
            raise EdgerunError(f"{path} is not a bundle: export it first, or pass --engine eager")
        if arguments.budgets:
            raise EdgerunError("--budgets needs --engine eager: a bundle has the one budget it was exported with")
        others = [] if arguments.against is None else [pathlib.Path(arguments.against)]
        # An eager answer has the build of its recipe too: without the word a record would hand it to the bundle.
        return [Contender(p.stem, p, None, f"bundle {Bundle.open(p, kind='text').build}") for p in (*others, path)], ()
    checks: tuple[Check, ...] = ()
    calibration = None
    if is_bundle:
        if arguments.checkpoint is None:
            raise EdgerunError(
                "--engine eager needs the weights: pass --checkpoint with the folder the bundle was made of"
            )
        bundle, path = Bundle.open(path, kind="text"), checkpoint_path(arguments.checkpoint)
        recipe, checks = bundle.recipe, agreement(bundle, path)
    else:
        recipe, calibration = calibrated_recipe(arguments)
    if arguments.budgets:
        return budget_contenders(
            path, recipe, arguments.budgets, arguments.selectors or ("chunk",), arguments.predictor
        ), checks
    if calibration is not None:
        calibration.require(Checkpoint.open(path).sha256())
    mine = eager_contender("calibrated" if calibration is not None else recipe.attention, path, recipe)
    if arguments.against is None:
        return [mine], checks
    if arguments.against != "dense":
        raise EdgerunError(f"--against is {arguments.against!r}; with --engine eager it is `dense`")
    return [eager_contender("dense", path, dataclasses.replace(recipe, attention="dense")), mine], checks


def _refuse_unused(arguments: argparse.Namespace, is_bundle: bool, engine: str) -> None:
    """Raise EdgerunError for an option that would change nothing."""
    unused = (
        (
            arguments.checkpoint and not (is_bundle and engine == "eager"),
            "--checkpoint is for a bundle's eager answers",
        ),
        (
            arguments.against and arguments.budgets,
            "--against and --budgets exclude each other: --budgets asks dense too",
        ),
        (arguments.selectors and not arguments.budgets, "--selectors is for --budgets"),
        (arguments.predictor and not arguments.budgets, "--predictor is for the selectors of --selectors"),
        (
            arguments.suite != "perplexity" and (arguments.text or arguments.last),
            "--text and --last are for perplexity",
        ),
        (arguments.suite == "perplexity" and arguments.tasks, "--tasks is not for perplexity, which has one"),
        (arguments.calibration and arguments.budgets, "--budgets and --calibration exclude each other"),
        (
            is_bundle and (arguments.calibration or recipe_from(arguments) != Recipe()),
            "a bundle computes what it was exported for",
        ),
    )
    for given, reason in unused:
        if given:
            raise EdgerunError(f"{reason}: leave out what does not apply (`edgerun eval --help`)")


def agreement(bundle: Bundle, checkpoint: pathlib.Path) -> tuple[Check, ...]:
    """Gates of a bundle on this machine against the eager model of its checkpoint, on the bundle's golden cases.

    Raises BundleError when the checkpoint is not the one that the bundle was made of.
    """
    from edgerun.checkpoint import Checkpoint
    from edgerun.commands.measure import force_on
    from edgerun.devices import open_device
    from edgerun.errors import BundleError
    from edgerun.evaluation import fidelity
    from edgerun.models import causal_lm

    opened = Checkpoint.open(checkpoint)
    if opened.sha256() != bundle.manifest["source"]["sha256"]:
        raise BundleError(f"{bundle.path} was not made of {checkpoint}: pass the checkpoint that it was made of")
    model = causal_lm.load(opened, bundle.recipe)
    host = open_device("host")
    noise = fidelity.Noise.from_manifest(bundle.manifest)
    checks: list[Check] = []
    for case in bundle.golden_cases():
        prompt, forced = case.prompt.tolist(), case.forced.tolist()
        measured, logits = force_on(host, bundle.path, prompt, forced)
        eager = fidelity.eager_logits(model, prompt, forced, bundle.recipe.prefill_slice)
        found = fidelity.measure(logits, eager)
        checks += fidelity.checks(found, bundle.recipe, sparse=measured.sparse, noise=noise, label="bundle and eager: ")
    return tuple(checks)
