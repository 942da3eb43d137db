"""What the accuracy lab runs: selectors, finalists, budgets and samples of each stage (bench/accuracy_lab.py)."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

from edgerun.commands import eval_selectors
from edgerun.commands.eval_contenders import eager_contender
from edgerun.evaluation.answers import Contender, Job
from edgerun.recipe import DhsaOptions, Recipe
from edgerun.selectors.registry import OP_SELECTORS, SELECTORS, needs_predictor

LENGTH = 8192  # tokens, of stages 1 and 2
# (B / L)(2 - B / L) = 12.5, 25 and 43.75 %; at 2,048 tokens the first is below the least budget.
BUDGETS = {2048: (274, 512), 4096: (265, 549, 1024), 8192: (529, 1098, 2048)}
# Dense attention answers 90 % of these at 8,192 tokens, which the page checks.
SOLVED = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2")
# What RULER has besides, of the tasks without data; the shipped model was not trained for most of them.
OTHERS = ("niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")
DEFAULT = "chunk"  # what ships
PAPER = "paper-v1"
FINALISTS = (DEFAULT, "recent/shipped", PAPER, "block-topk", "window-sink")
# One rule in prefill under the same decode, then the other way round: what each half of a rule is worth.
PREFILL_RULES = ("recent", "block-mean", "mean", "oracle", "vertical-slash", "antidiagonal", "shuffled", "paper-v1")
DECODE_RULES = ("dense", "oracle", "moments", "mean", "block-mean", "quest", "minmax", "recent", "shuffled")
MIXTURES = (*(f"{rule}/shipped" for rule in PREFILL_RULES), *(f"shipped/{rule}" for rule in DECODE_RULES))
VARIANTS = (
    "moments-fixed@16",
    "moments-fixed@32",
    "moments-fixed@48",
    "moments-cosine@0.4",
    "moments-cosine@0.5",
    "moments-learned@1.7",
    "moments-learned@2",
)
VARIANTS += ("antidiagonal@16",)
THRESHOLDS = ("blasst@-2", "blasst@-4", "blasst@-8")  # no budget: measured at the least one, whatever they attend
TITLES = {
    "dense": "dense",
    "chunk": "DHSA, as it ships",
    "recent/shipped": "window + sink in prefill, DHSA in decode",
    "paper-v1": "DHSA, paper's v1",
    "block-topk": "block top-k",
    "window-sink": "window + sink",
}
DEPTHS = (0, 25, 50, 75, 100)


@dataclasses.dataclass(frozen=True)
class Lab:
    """Where a run works, on what, and with what."""

    model: pathlib.Path
    work: pathlib.Path
    processes: int
    predictor: pathlib.Path | None = None

    def contender(self, selector: str, budget: int | None = None) -> Contender:
        """`dense`, or a selector at a budget. Raises EdgerunError for what cannot be."""
        if selector == "dense":
            return eager_contender("dense", self.model, Recipe(attention="dense"))
        dhsa = DhsaOptions(**({} if budget is None else {"budget": budget}))
        name = selector if budget is None else f"{selector} {budget}"
        if selector in OP_SELECTORS:
            return eager_contender(name, self.model, Recipe(dhsa=dataclasses.replace(dhsa, selector=selector)))
        return eager_contender(name, self.model, Recipe(dhsa=dhsa), selector, self.predictor)

    def base(self, names: Sequence[str] = ()) -> Contender:
        """The model as it ships, in which stage 1 tries selectors. Raises EdgerunError where one lacks a predictor."""
        return eval_selectors.base_contender(self.model, Recipe(), names, self.predictor)

    def usable(self, selectors: Sequence[str]) -> tuple[str, ...]:
        """Those that need no predictor, or all where there is one."""
        return tuple(name for name in selectors if self.predictor or not needs_predictor(name))

    @property
    def answers(self) -> pathlib.Path:
        """The record of stages 2, 3 and needle."""
        return self.work / "answers.jsonl"

    @property
    def measurements(self) -> pathlib.Path:
        """The record of stage 1."""
        return self.work / "selectors.jsonl"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Contenders that all answer the same jobs."""

    contenders: tuple[Contender, ...]
    jobs: tuple[Job, ...]


def ruler_jobs(tasks: Sequence[str], length: int, samples: int, first: int = 0) -> tuple[Job, ...]:
    """Samples `first` to `samples` - 1 of each task."""
    return tuple(Job("ruler", task, length, 0, index) for index in range(first, samples) for task in tasks)


def stage_2(lab: Lab, samples: int, tasks: Sequence[str] = SOLVED) -> list[Plan]:
    """The finalists at every budget, the mixture at the least, and dense."""
    names, budgets = lab.usable(FINALISTS), BUDGETS[LENGTH]
    pairs = [(name, budget) for budget in budgets for name in names if "/" not in name or budget == budgets[0]]
    contenders = (lab.contender("dense"), *(lab.contender(*pair) for pair in pairs))
    return [Plan(contenders, ruler_jobs(tasks, LENGTH, samples))]


def stage_3(lab: Lab, samples: int, tasks: Sequence[str] = SOLVED) -> list[Plan]:
    """The default against dense: first at the least density of 8,192 tokens, then half of it at the shorter lengths."""
    plans = []
    for length, budgets in sorted(BUDGETS.items(), reverse=True):
        chosen = budgets[:1] if length == LENGTH else budgets
        contenders = (lab.contender("dense"), *(lab.contender(DEFAULT, budget) for budget in chosen))
        plans.append(Plan(contenders, ruler_jobs(tasks, length, samples if length == LENGTH else samples // 2)))
    return plans


def other_tasks(lab: Lab, samples: int) -> list[Plan]:
    """RULER's other tasks: dense, the default at the least budget, and window + sink."""
    budget = BUDGETS[LENGTH][0]
    contenders = (lab.contender("dense"), *(lab.contender(name, budget) for name in (DEFAULT, "window-sink")))
    return [Plan(contenders, ruler_jobs(OTHERS, LENGTH, samples))]


def needle_grid(lab: Lab, samples: int) -> list[Plan]:
    """Depth by length, dense and the default at 12.5 % (at 2,048 tokens 25 %) and window + sink."""
    plans = []
    for length, budgets in BUDGETS.items():
        names = (DEFAULT, "window-sink")
        contenders = (lab.contender("dense"), *(lab.contender(name, budgets[0]) for name in names))
        jobs = tuple(Job("needle", f"depth_{d}", length, 0, i) for i in range(samples) for d in DEPTHS)
        plans.append(Plan(contenders, jobs))
    return plans


def stage_1(lab: Lab) -> list[tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]]:
    """Selectors, lengths of prompts, and budgets: all selectors at all lengths, variants and mixtures at the longest.

    Mixtures, and what has no budget, are measured at the least one alone.
    """
    every = tuple(name for name, entry in SELECTORS.items() if entry.has_budget and name != "moments-cosine")
    lengths, budgets = tuple(sorted(BUDGETS, reverse=True)), BUDGETS[LENGTH]
    alone = (*MIXTURES, *THRESHOLDS)
    parts = ((every, lengths, budgets), (VARIANTS, (LENGTH,), budgets), (alone, (LENGTH,), budgets[:1]))
    return [(lab.usable(names), of, within) for names, of, within in parts]


def selector_jobs(lengths: Sequence[int], samples: int) -> list[Job]:
    """`samples` prompts a length, four tasks in turns."""
    return eval_selectors.selector_jobs(eval_selectors.TASKS, lengths, samples, 0)
