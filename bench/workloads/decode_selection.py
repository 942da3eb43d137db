"""What decode loses with cheaper selections, on a byte-level text model: one for several tokens (`--reselect`), and
fewer channels in the second ranking (`--refine`).

    python bench/workloads/decode_selection.py [--checkpoint zoo:text] [--budgets 529 2048]

Every prompt is read once, sparsely; then each setting continues from the same cache, one token at a time. `answers`:
RULER tasks, greedy, string match, with the paired difference from selecting for every token. `forced`: held-out text
of train_zoo_text.py is fed behind a prompt of it, and the logits are held against dense attention's: mean KL(dense ||
sparse) in nats. A row is written when it is complete, and the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from bench.harness import RESULTS, ResultFile, Row
from bench.train_zoo_text import BOS, read_split
from bench.workloads.first_token import find_checkpoint
from edgerun.checkpoint import Checkpoint
from edgerun.errors import EdgerunError
from edgerun.evaluation import fidelity, ruler
from edgerun.evaluation.answerers import end_tokens
from edgerun.evaluation.statistics import paired_difference
from edgerun.library_noise import quiet_libraries
from edgerun.models import causal_lm
from edgerun.models.cached_attention import AttentionCache
from edgerun.models.causal_lm import CausalLM
from edgerun.recipe import DhsaOptions, Recipe

SEED = 2026


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: the settings that a result file belongs to."""

    checkpoint: str
    length: int  # tokens of prompt and answer, or of prompt and forced text
    budgets: tuple[int, ...]
    every: tuple[int, ...]  # tokens that one selection serves
    refine: tuple[int, ...]  # channels; the first of both is compared with
    tasks: tuple[str, ...]
    samples: int  # of a task
    texts: int
    forced: int  # tokens behind each text
    threads: int

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The first of both, then each of the others alone."""
        every, refine = self.every[0], self.refine[0]
        others = [Setting(one, refine) for one in self.every[1:]] + [Setting(every, one) for one in self.refine[1:]]
        return (Setting(every, refine), *others)


@dataclasses.dataclass(frozen=True)
class Setting:
    """How decode selects."""

    every: int
    refine: int

    def __str__(self) -> str:
        return f"every {self.every:>2} tokens, {self.refine:>2} channels"


class Model:
    """An eager model whose decode can go on from one prompt again and again, selecting as it is told."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, budget: int) -> None:
        dhsa = DhsaOptions(budget=budget or DhsaOptions().budget, reselect=max(plan.every))
        self.recipe = Recipe("dhsa" if budget else "dense", dhsa, -(-plan.length // 64) * 64)
        self.model: CausalLM = causal_lm.load(checkpoint, self.recipe)
        self._options = [module.options for module in self._caches()]

    def _caches(self) -> list[AttentionCache]:
        return [module for module in self.model.modules() if isinstance(module, AttentionCache)]

    def select(self, setting: Setting) -> None:
        """From here on decode selects so; layers without a budget have nothing to select."""
        for module, options in zip(self._caches(), self._options, strict=True):
            if options.budget > 0:
                module.options = dataclasses.replace(options, reselect=setting.every, refine=setting.refine)
                module.selection.zero_()  # what another setting kept is not this one's

    def read(self, prompt: Sequence[int]) -> np.ndarray:
        """Logits after a prompt."""
        return fidelity.eager_logits(self.model, prompt, [], self.recipe.prefill_slice)[0]

    def feed(self, token: int, position: int) -> np.ndarray:
        """Logits after a token at a position."""
        with torch.inference_mode():
            logits: np.ndarray = self.model(torch.tensor([[token]]), torch.tensor([position]))[0].numpy().copy()
        return logits

    def answer(self, prompt_tokens: int, after_prompt: np.ndarray, most: int, ends: frozenset[int]) -> list[int]:
        """Greedy tokens behind a prompt that was read."""
        found = [int(after_prompt.argmax())]
        while found[-1] not in ends and len(found) < most:
            found.append(int(self.feed(found[-1], prompt_tokens + len(found) - 1).argmax()))
        return found

    def follow(self, prompt_tokens: int, after_prompt: np.ndarray, forced: Sequence[int]) -> np.ndarray:
        """Logits [forced + 1, vocab] behind a prompt that was read."""
        return np.stack([after_prompt, *(self.feed(one, prompt_tokens + i) for i, one in enumerate(forced))])


def run(plan: Plan, results: ResultFile) -> None:
    """Measure every row that the results lack."""
    torch.set_num_threads(plan.threads)
    folder = find_checkpoint(plan.checkpoint, results.path.parent if results.path else pathlib.Path())
    checkpoint = Checkpoint.open(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = end_tokens(checkpoint.config, checkpoint.generation)
    texts = list(held_out_texts(plan))
    dense: list[np.ndarray] | None = None
    for budget in plan.budgets:
        model = Model(checkpoint, plan, budget)
        for task in plan.tasks:
            key = {"kind": "answers", "budget": budget, "task": task, "length": plan.length}
            if results.find(key) is None:
                results.add({**key, "candidates": answers(model, plan, task, tokenizer, ends)})
            print(*row_lines(results.find(key)), sep="\n", flush=True)
        key = {"kind": "forced", "budget": budget, "length": plan.length}
        if results.find(key) is None:
            dense = dense or [
                found[0] for found in follow(Model(checkpoint, plan, 0), texts, plan.settings[:1], plan.forced)
            ]
            results.add({**key, "candidates": forced(model, plan, texts, dense)})
        print(*row_lines(results.find(key)), sep="\n", flush=True)


def held_out_texts(plan: Plan) -> Iterator[list[int]]:
    """Windows of held-out bytes, `length` tokens each with the first, spread evenly."""
    text = b"\n".join(read_split(held_out=True))
    stride = (len(text) - plan.length) // plan.texts
    for n in range(plan.texts):
        yield [BOS, *text[n * stride : n * stride + plan.length - 1]]


def follow(
    model: Model, texts: Sequence[Sequence[int]], settings: Sequence[Setting], forced: int
) -> Iterator[list[np.ndarray]]:
    """For each text the logits of its last `forced` tokens at each setting."""
    for text in tqdm(texts, desc="texts", disable=None):
        prompt, rest = text[: len(text) - forced], text[len(text) - forced :]
        model.select(settings[0])  # a slice of one row selects as decode does
        first = model.read(prompt)
        found = []
        for setting in settings:
            model.select(setting)
            found.append(model.follow(len(prompt), first, rest))
        yield found


def forced(
    model: Model, plan: Plan, texts: Sequence[Sequence[int]], dense: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """Fidelity to dense attention at each setting, and the paired difference of KL, in nats, from the first."""
    rows: list[list[fidelity.Fidelity]] = [[] for _ in plan.settings]
    for truth, found in zip(dense, follow(model, texts, plan.settings, plan.forced), strict=True):
        for one, logits in zip(rows, found, strict=True):
            one.append(fidelity.measure(logits[1:], truth[1:]))
    kls = [[one.mean_kl_nats for one in row] for row in rows]
    return [
        {
            **dataclasses.asdict(setting),
            "mean_kl_nats": float(np.mean(kl)),
            "top1": float(np.mean([one.top1 for one in row])),
            "difference": dataclasses.asdict(paired_difference(kl, kls[0])),
            "kl_nats": kl,
        }
        for setting, row, kl in zip(plan.settings, rows, kls, strict=True)
    ]


def answers(model: Model, plan: Plan, task: str, tokenizer: Tokenizer, ends: frozenset[int]) -> list[dict[str, Any]]:
    """Scores of a task at each setting, and the paired difference from the first."""
    scores: list[list[float]] = [[] for _ in plan.settings]

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    for index in tqdm(range(plan.samples), desc=task, disable=None):
        sample = ruler.generate(task, plan.length, SEED, index, count_tokens=count)
        prompt = tokenizer.encode(sample.prompt).ids
        model.select(plan.settings[0])  # a slice of one row selects as decode does
        first = model.read(prompt)
        for one, setting in zip(scores, plan.settings, strict=True):
            model.select(setting)
            found = model.answer(len(prompt), first, sample.max_new_tokens, ends)
            one.append(ruler.score(sample, tokenizer.decode(found)))
    return [
        {
            **dataclasses.asdict(setting),
            "mean_score": float(np.mean(one)),
            "difference": dataclasses.asdict(paired_difference(one, scores[0])),
            "scores": one,
        }
        for setting, one in zip(plan.settings, scores, strict=True)
    ]


def row_lines(row: Row | None) -> Iterator[str]:
    """A row as a table."""
    assert row is not None
    what = row["task"] if row["kind"] == "answers" else "held-out text"
    yield f"\n{what}, {row['length']} tokens, budget {row['budget']}"
    for one in row["candidates"]:
        difference, setting = one["difference"], Setting(one["every"], one["refine"])
        if row["kind"] == "answers":
            figures = f"score {100 * one['mean_score']:5.1f}, difference"
            low, middle, high = (100 * difference[name] for name in ("low", "estimate", "high"))
            yield f"  {setting}: {figures} {middle:+.1f} points [{low:+.1f}, {high:+.1f}]"
        else:
            low, middle, high = (difference[name] for name in ("low", "estimate", "high"))
            figures = f"KL {one['mean_kl_nats']:.4f} nats, top-1 {100 * one['top1']:.1f} %, difference"
            yield f"  {setting}: {figures} {middle:+.4f} nats [{low:+.4f}, {high:+.4f}]"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="zoo:text", help="zoo:text, or a folder whose tokens are bytes")
    parser.add_argument("--length", type=int, default=8192, help="default: %(default)s")
    parser.add_argument("--budgets", type=int, nargs="+", default=[529, 2048], help="default: %(default)s")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 4, 16], help="the first is compared with")
    channels = [DhsaOptions().refine, 24, 16, 8, 0]
    parser.add_argument("--refine", type=int, nargs="+", default=channels, help="the first is compared with")
    parser.add_argument("--tasks", nargs="*", default=["niah_single_1", "niah_multikey_2"], help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=50, help="of a task; default: %(default)s")
    parser.add_argument("--texts", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--forced", type=int, default=128, help="tokens behind each text; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "decode_selection.json")
    parser.add_argument("--fresh", action="store_true", help="measure every row anew")
    given = parser.parse_args(arguments)
    fields = {field.name for field in dataclasses.fields(Plan)}
    plan = Plan(**{n: tuple(v) if isinstance(v, list) else v for n, v in vars(given).items() if n in fields})
    if min(plan.every) < 1 or plan.samples < 1 or plan.texts < 1 or not 0 < plan.forced < plan.length:
        parser.error("every, samples and texts must be at least 1, and forced lie between 0 and the length")
    quiet_libraries()
    command = " ".join(
        ["python", "bench/workloads/decode_selection.py", *(sys.argv[1:] if arguments is None else arguments)]
    )
    results = ResultFile(given.output, command, dataclasses.asdict(plan), fresh=given.fresh)
    try:
        run(plan, results)
    except EdgerunError as error:
        sys.exit(f"error: {error}")
    print(f"\nwrote {given.output}")


if __name__ == "__main__":
    main()
