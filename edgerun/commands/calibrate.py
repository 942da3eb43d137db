"""Choose for every layer of a text model whether it attends sparsely, how and how much, for a quality that you state.

The quality is --max-kl: the mean KL divergence to the dense model, in nats a token, while the end of each text is
decoded with the text's own tokens. The text is split in three. By the first part, every layer is measured alone in
every way, and the cheapest combination is proposed and measured as a whole; by the second it is narrowed until it holds
there too. The third proves it: it is measured once, and the file is written only if the choice holds there. With
several --lengths it holds at each. The file also gets a boundary predictor, trained on the model's own attention. A
stopped run goes on where it was, from OUTPUT.jsonl. Exit status 1: nothing that is sparse keeps the target, or the
choice misses it on the third part.

Give text like what the model will read. Long files are used from their end; 3 x --samples different windows are needed.

examples
  edgerun calibrate zoo:text --text docs/*.txt -o text.calibration
  edgerun calibrate ./Llama-3.2-1B --text books/*.txt -o llama.calibration --max-kl 0.01 --lengths 4096,8192
  edgerun calibrate zoo:text --text docs/*.txt -o text.calibration --budgets 192,384,768 --skip-predictor
  edgerun calibrate zoo:text --text other/*.txt --check text.calibration --seed 7      does it hold on other text?
  edgerun export zoo:text -o text.edgerun --calibration text.calibration
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgerun.calibration import Achieved, Calibration
from edgerun.commands.common import (
    CHECK_FAILED,
    Tools,
    add_output_options,
    begin_report,
    checkpoint_path,
    emit,
    finite,
    positive,
    positive_list,
    stage_bar,
)
from edgerun.errors import EdgerunError
from edgerun.recipe import DhsaOptions, Recipe
from edgerun.report import Cell, Check, Column, Estimate, Report, Table

if TYPE_CHECKING:
    from edgerun.evaluation.calibrate import Outcome

SUMMARY = "which layer may attend how sparsely?"
# Of edgerun.evaluation.calibrate.Settings, which loads torch; a test holds them together.
_MAX_KL, _LENGTHS, _SAMPLES, _BUDGETS, _DECODE = 0.02, (4096,), 6, (256, 512, 1024, 2048), 64

_PLACES = {
    "chosen by": "the text that it was chosen by",
    "held out": "held-out text, by which it was narrowed",
    "proof": "proof text, by which nothing was chosen",
}
_DECIDED = ("budgets", "tile", "decode_tokens", "skip_predictor", "overwrite")  # not asked for with --check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `edgerun calibrate`."""
    dhsa, recipe = DhsaOptions(), Recipe()
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the checkpoint, or zoo:text")
    parser.add_argument(
        "--text", type=pathlib.Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text to measure on"
    )
    parser.add_argument("-o", "--output", type=pathlib.Path, metavar="FILE.calibration", help="the file to make")
    parser.add_argument(
        "--check", type=pathlib.Path, metavar="FILE", help="measure this calibration on the text; make nothing"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a calibration of the same name")
    what = parser.add_argument_group("what is asked for")
    what.add_argument(
        "--max-kl",
        type=finite,
        metavar="X",
        help=f"nats; default: {_MAX_KL}, with which zoo:text answers retrieval tasks as well as dense",
    )
    what.add_argument(
        "--lengths",
        type=positive_list,
        metavar="N,N",
        help=f"tokens of a text; default: {_LENGTHS[0]}, or those of --check",
    )
    what.add_argument(
        "--budgets",
        type=positive_list,
        metavar="N,N",
        help=f"to choose from; default: {','.join(map(str, _BUDGETS))}",
    )
    what.add_argument(
        "--samples",
        type=positive,
        default=_SAMPLES,
        metavar="N",
        help="texts to choose by, as many to narrow by, as many to prove on; --check takes all; default: %(default)s",
    )
    what.add_argument("--seed", type=int, default=0, metavar="S", help="draws the texts; default: %(default)s")
    what.add_argument(
        "--decode-tokens",
        type=positive,
        metavar="N",
        help=f"last tokens of a text, fed one by one; default: {_DECODE}",
    )
    what.add_argument("--skip-predictor", action="store_true", help="train no boundary predictor")
    how = parser.add_argument_group("what all layers share")
    how.add_argument("--tile", type=positive, metavar="N", help=f"default: {dhsa.tile}")
    how.add_argument(
        "--max-context", type=positive, metavar="N", help="tokens that the model is loaded for; default: longest length"
    )
    how.add_argument(
        "--prefill-slice", type=positive, default=recipe.prefill_slice, metavar="N", help="default: %(default)s"
    )
    add_output_options(parser)


def run(arguments: argparse.Namespace, tools: Tools) -> int:
    """`edgerun calibrate`."""
    if (arguments.output is None) == (arguments.check is None):
        raise EdgerunError("pass -o FILE.calibration to make a calibration, or --check FILE to measure one")
    if arguments.check is not None and (given := [name for name in _DECIDED if getattr(arguments, name)]):
        raise EdgerunError(
            f"--{given[0].replace('_', '-')} is given beside --check, which makes nothing and takes what the "
            "calibration has: leave out one of them"
        )
    from edgerun.evaluation.text_files import read_texts

    texts = read_texts(arguments.text)
    report = begin_report("calibrate", f"edgerun calibrate: {arguments.checkpoint}", tools.command)
    if arguments.check is not None:
        return emit(_check(arguments, texts, report), arguments)
    return _make(arguments, texts, report)


def _make(arguments: argparse.Namespace, texts: Sequence[str], report: Report) -> int:
    from edgerun.checkpoint import Checkpoint
    from edgerun.evaluation.calibrate import Settings, calibrate

    out: pathlib.Path = arguments.output
    if out.is_dir():
        raise EdgerunError(f"{out} is a folder: pass -o the name of a file")
    if out.exists() and not arguments.overwrite:
        raise EdgerunError(f"{out} is there: pass --overwrite, or choose another name")
    if not out.absolute().parent.is_dir():
        raise EdgerunError(f"cannot write {out}: folder {out.parent} does not exist; create it first")
    budgets = arguments.budgets or _BUDGETS
    settings = Settings(
        lengths=arguments.lengths or _LENGTHS,
        samples=arguments.samples,
        seed=arguments.seed,
        decode_tokens=arguments.decode_tokens or _DECODE,
        max_kl_nats=_MAX_KL if arguments.max_kl is None else arguments.max_kl,
        budgets=budgets,
        dhsa=DhsaOptions(tile=arguments.tile or DhsaOptions().tile, budget=max(DhsaOptions().budget, *budgets)),
        max_context=arguments.max_context,
        prefill_slice=arguments.prefill_slice,
        predictor=not arguments.skip_predictor,
    )
    checkpoint = Checkpoint.open(checkpoint_path(arguments.checkpoint))
    record = out.with_name(f"{out.name}.jsonl")
    with stage_bar(f"calibrate {out.name}") as progress:
        outcome = calibrate(checkpoint, texts, settings, record=record, progress=progress)
    if outcome.calibration is None:
        checks = _checks(outcome.closest, settings.max_kl_nats)
        emit(dataclasses.replace(report, tables=_tables(outcome), checks=checks), arguments)
        print(f"edgerun calibrate: {_miss(outcome, settings.max_kl_nats)}", file=sys.stderr)
        return CHECK_FAILED
    made = outcome.calibration.save(out, outcome.predictor)
    report = dataclasses.replace(
        report, facts=_facts(made), tables=_tables(outcome), checks=_checks(made.achieved, settings.max_kl_nats)
    )
    return emit(report, arguments)


def _check(arguments: argparse.Namespace, texts: Sequence[str], report: Report) -> Report:
    from edgerun.checkpoint import Checkpoint
    from edgerun.evaluation.calibrate import measure_calibration

    calibration = Calibration.open(arguments.check)
    if arguments.samples < 2:
        raise EdgerunError(f"--samples is {arguments.samples}; an interval needs at least 2")
    with stage_bar(f"check {arguments.check.name}") as progress:
        achieved = measure_calibration(
            calibration,
            Checkpoint.open(checkpoint_path(arguments.checkpoint)),
            texts,
            lengths=arguments.lengths,
            samples=arguments.samples,
            seed=arguments.seed,
            max_context=arguments.max_context,
            prefill_slice=arguments.prefill_slice,
            progress=progress,
        )
    target = calibration.max_kl_nats if arguments.max_kl is None else arguments.max_kl
    checks = _checks(achieved, target)
    return dataclasses.replace(
        report, facts=_facts(calibration), tables=(_achieved(achieved, "this text"),), checks=checks
    )


def _miss(outcome: Outcome, target: float) -> str:
    """Why there is no calibration, in one line."""
    reached = ""
    if outcome.closest:
        worst = max(outcome.closest, key=lambda one: one.high)
        reached = f"{worst.mean_kl_nats:.3g} (up to {worst.high:.3g}, {worst.texts} texts at {worst.length} tokens)"
    if outcome.part == "proof":
        return (
            f"the choice misses the target of {target:g} nats on proof text, with {reached}; nothing was written. "
            "Choose by more text (--samples), or raise --max-kl; trying again on the same proof would choose by it"
        )
    if reached:
        reached = f"the most careful choice has {reached}"
    else:
        least = min(option.divergence for layer in outcome.alone for option in layer[1:])
        reached = f"one layer alone already has {least:.3g}"
    return (
        f"no sparse choice keeps a KL of {target:g} nats: {reached}; nothing was written. Raise --max-kl, --budgets or "
        "--samples, or export with --attention dense, which is trivially within"
    )


def _facts(calibration: Calibration) -> tuple[tuple[str, Cell], ...]:
    facts: list[tuple[str, Cell]] = [
        ("calibration", f"sha256 {calibration.sha256[:16]}, made by edgerun {calibration.edgerun_version}"),
        ("checkpoint", f"{calibration.model.model_type}, sha256 {calibration.checkpoint_sha256[:16]}"),
        ("target", f"mean KL to dense of at most {calibration.max_kl_nats:g} nats"),
        ("layers", "; ".join(choice.name for choice in calibration.dhsa.layers)),
    ]
    if (metrics := calibration.predictor) is not None:
        facts.append(
            (
                "boundary predictor",
                f"of layer {metrics.layer}'s keys, {metrics.parameters:,} parameters, "
                f"{metrics.multiply_adds_per_token:,} multiply-adds a token; on proof text area under ROC "
                f"{metrics.auc:.3f} (cosine {metrics.cosine_auc:.3f}), {100 * metrics.positives:.0f} % boundaries, "
                f"loss {metrics.loss:.4f} from {metrics.loss_before:.4f}",
            )
        )
    return tuple(facts)


def _tables(outcome: Outcome) -> tuple[Table, ...]:
    chosen = outcome.calibration.dhsa.layers if outcome.calibration is not None else None
    layers = len(outcome.alone)
    rows: list[tuple[Cell, ...]] = []
    for layer, options in enumerate(outcome.alone):
        for option in options:
            taken = chosen is not None and chosen[layer] == option.choice
            saved = 100 * (0.0 - option.cost) * layers / outcome.dense_pairs
            rows.append((layer, option.choice.name, "x" if taken else "", option.divergence, saved))
    columns = (
        Column("layer"),
        Column("choice"),
        Column("chosen"),
        Column("KL alone", "nats", 5),
        Column("pairs saved", "%", 1),
    )
    note = "Each layer alone, all others dense; saved: of what the layer attends, as a mean over the model's layers."
    tables = [Table("Every option that was measured", columns, tuple(rows), note)]
    return tuple([_achieved(outcome.closest, _PLACES[outcome.part]), *tables] if outcome.closest else tables)


def _achieved(achieved: Sequence[Achieved], place: str) -> Table:
    columns = (
        Column("length", "tokens"),
        Column("texts"),
        Column("KL to dense", "nats", 5),
        Column("density", "%", 1),
    )
    rows = tuple(
        (one.length, one.texts, Estimate(one.mean_kl_nats, one.low, one.high, n=one.texts), 100 * one.density)
        for one in achieved
    )
    return Table(f"The choice as a whole, on {place}", columns, rows, "Mean over texts, Student's 95 % interval.")


def _checks(achieved: Sequence[Achieved], target: float) -> tuple[Check, ...]:
    return tuple(
        Check(
            f"KL to dense at {one.length} tokens, upper end, nats",
            one.high,
            target,
            False,
            one.holds(target),
            f"mean {one.mean_kl_nats:.3g} over {one.texts} texts",
        )
        for one in achieved
    )
