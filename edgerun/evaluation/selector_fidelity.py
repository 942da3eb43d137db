"""How near a selector stays to dense attention: the attention that its blocks hold, and the answer's probabilities.

Recall: one dense pass over a prompt and its right answer, in which every selector lists its blocks for every layer and
KV head on the same queries and keys: for each tile of the prompt, and for some single tokens of the answer. The listed
blocks' part of the exact attention, summed over rows and query heads, is held against that of the best blocks of the
same number. Tiles that fit the budget are dense for everyone and left out. Divergence: the selector prefills the
prompt, the right answer is fed token by token, and the logits at the answer's positions are held against dense ones.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from edgerun.errors import EdgerunError
from edgerun.evaluation import fidelity, record_lines, ruler
from edgerun.evaluation.answerers import EagerAnswerer
from edgerun.evaluation.answers import Contender, Job
from edgerun.evaluation.processes import run_anywhere
from edgerun.evaluation.sample import TokenCounter
from edgerun.ops.dhsa_attention import Lists, count_attention
from edgerun.recipe import MICRO_BLOCK
from edgerun.selectors import attention, registry
from edgerun.selectors.attention import Engine
from edgerun.selectors.estimates import exact_logits, exact_mass
from edgerun.selectors.interface import BlockSelector, Call, RankedSelector, choose, everything
from edgerun.selectors.paper import PaperAttention
from edgerun.selectors.pooled import Pooled
from edgerun.selectors.simple import Dense

PREFILL, DECODE, DIVERGENCE = "prefill", "decode", "divergence"
_DIVERGENCES = 2  # selectors of one task, each at every budget
_DECODE_POSITIONS = 8  # of an answer, at which lists are asked for

Recall = tuple[list[float], list[float], float, float]  # held, best by KV head; attended, causal pairs


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One selector at one budget on one prompt.

    kind prefill and decode: recall. held and best: mean share of a row's attention in the listed blocks, and in the
    best ones of the same number, by layer and KV head; chunk_tokens: mean length of a chunk where there are some. kind
    divergence: means over the answer's positions.
    """

    build: str
    kind: str
    selector: str
    budget: int
    job: Job
    density: float | None
    layers: tuple[int, ...] = ()
    held: tuple[tuple[float, ...], ...] = ()
    best: tuple[tuple[float, ...], ...] = ()
    kl_nats: float | None = None
    top1: float | None = None
    chunk_tokens: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a measurement the same one."""
        return (self.build, self.kind, self.selector, self.budget, self.job)

    def to_json(self) -> dict[str, Any]:
        """A line of the record."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Measurement:
        """The measurement that a line holds."""
        grids = {name: tuple(tuple(row) for row in values[name]) for name in ("held", "best")}
        layers = tuple(values.get("layers", range(len(values["held"]))))
        job = Job(**{**values["job"], "files": ()})
        return Measurement(**{**values, **grids, "layers": layers, "job": job})


class Probe(BlockSelector):
    """Attends everything, and asks every selector at every budget what it would have listed, while `asks`."""

    def __init__(self, selectors: dict[str, BlockSelector | PaperAttention], budgets: Sequence[int]) -> None:
        self.selectors, self.budgets = selectors, budgets
        self.asks = True
        self.chunk_tokens: dict[str, float] = {}
        # by (kind, selector, budget), then by layer: one entry a call
        self.found: dict[tuple[str, str, int], dict[int, list[Recall]]] = {}

    def lists(self, call: Call) -> Lists:
        if not self.asks:
            return everything(call)
        mass = exact_mass(call)
        kind = PREFILL if call.query.shape[2] > 1 else DECODE
        for name, selector in self.selectors.items():
            if kind == DECODE and isinstance(selector, RankedSelector) and selector.dense_decode:
                continue
            memory, shared = (where.setdefault(name, {}) for where in (call.memory, call.shared))
            mine = dataclasses.replace(call, memory=memory, shared=shared)
            if isinstance(selector, Pooled):
                starts = selector.chunk_starts(mine)
                self.chunk_tokens[name] = MICRO_BLOCK * len(starts) / int(starts.sum())
            scores = selector.scores(mine) if isinstance(selector, RankedSelector) else None
            for budget in self.budgets:
                one = dataclasses.replace(mine, options=dataclasses.replace(call.options, budget=budget))
                if isinstance(selector, PaperAttention):
                    result = token_recall(one, selector)
                else:
                    result = recall(selector.lists(one) if scores is None else choose(scores, one), one, mass)
                if result is not None:
                    self.found.setdefault((kind, name, budget), {}).setdefault(call.layer, []).append(result)
        return everything(call)


def recall(lists: Lists, call: Call, mass: torch.Tensor) -> Recall | None:
    """(held, best) for each KV head and (attended, causal) pairs, over the groups beyond the budget; None without one.

    mass [Hkv, groups, blocks]: the attention that each block gets, as `exact_mass` has it.
    """
    sparse = [g for g, (_, last) in enumerate(call.groups) if call.input_pos + last > call.options.budget]
    attended, causal = pairs(lists, call)
    if not sparse:
        return None
    rows = sum(call.groups[g][1] - call.groups[g][0] for g in sparse) * call.query.shape[1]
    held, best = [], []
    for head, mine in enumerate(lists):
        ranked = mass[head, sparse].sort(dim=1, descending=True).values
        held.append(sum(float(mass[head, g, mine[g]].sum()) for g in sparse) / rows)
        best.append(sum(float(row[: len(mine[g])].sum()) for row, g in zip(ranked, sparse, strict=True)) / rows)
    return held, best, attended, causal


def token_recall(call: Call, selector: PaperAttention) -> Recall | None:
    """The same for the paper's lists of tokens, whose tiles are its own; best: of as many tokens."""
    options = dataclasses.replace(
        selector.options, budget=registry.paper_budget(call.options.budget, call.options.tile)
    )
    engine = dataclasses.replace(selector, options=options)
    heads, group, tokens, _ = call.query.shape
    tiles = dataclasses.replace(call, options=dataclasses.replace(call.options, tile=options.tile), memory={})
    held, best, rows = torch.zeros(heads), torch.zeros(heads), 0
    attended = 0
    for index, ((first, last), columns) in enumerate(engine.tokens(call, call.query.flatten(0, 1)[None])):
        positions = torch.arange(call.input_pos + first, call.input_pos + last)
        attended += int((columns <= positions[:, None]).sum())
        if call.input_pos + last <= options.budget:
            continue
        weights = exact_logits(tiles, index).softmax(dim=-1).sum(dim=(1, 2))  # [Hkv, end]
        held += weights[:, columns].sum(dim=1)
        best += weights.sort(dim=1, descending=True).values[:, : len(columns)].sum(dim=1)
        rows += group * (last - first)
    if not rows:
        return None
    causal = tokens * call.input_pos + tokens * (tokens + 1) // 2
    return (held / rows).tolist(), (best / rows).tolist(), float(attended * heads), float(causal * heads)


def pairs(lists: Lists, call: Call) -> tuple[float, float]:
    """(attended, causal) pairs of query and key, summed over KV heads; the rows of a group see its blocks causally."""
    attended = causal = 0
    for group, (first, last) in enumerate(call.groups):
        start, end = call.input_pos + first, call.input_pos + last
        rows = last - first
        causal += len(lists) * (rows * start + rows * (rows + 1) // 2)
        own = start // MICRO_BLOCK  # blocks before it are seen whole by every row
        for mine in lists:
            before = bisect.bisect_left(mine[group], own)
            tail = [p for b in mine[group][before:] for p in range(b * MICRO_BLOCK, min(end, (b + 1) * MICRO_BLOCK))]
            attended += rows * before * MICRO_BLOCK + sum(min(rows, end - max(p, start)) for p in tail)
    return float(attended), float(causal)


@dataclasses.dataclass(frozen=True)
class Task:
    """What one process does at once: the recall of all selectors on one prompt, or one selector's divergence."""

    contender: Contender
    job: Job
    kind: str
    selectors: tuple[str, ...]
    budgets: tuple[int, ...]


def build_of(contender: Contender, selector: str) -> str:
    """The identity of a measurement: the contender's, the selector's revision, its predictor's where it has one."""
    parts = [contender.build, registry.revision(selector)]
    if contender.predictor is not None and registry.needs_predictor(selector):
        parts.append(hashlib.sha256(contender.predictor.read_bytes()).hexdigest()[:16])
    return " ".join(part for part in parts if part)


def measure(task: Task) -> list[Measurement]:
    """Do a task. Raises EdgerunError for a selector or a budget that cannot be."""
    answerer, dense = loaded(task.contender)
    assert task.contender.recipe is not None
    prompt, answer = prompt_and_answer(task.job, answerer.count_tokens)
    ids = answerer.encode(prompt)
    forced = answerer.encode_more(answer)
    if task.kind == PREFILL:
        return _recalls(task, answerer, ids, forced)
    return list(_divergences(task, answerer, dense, ids, forced))


def _recalls(task: Task, answerer: EagerAnswerer, ids: list[int], forced: list[int]) -> list[Measurement]:
    """Recall of both kinds: the probe sits in the model while it reads the prompt and its answer densely."""
    contender = task.contender
    assert contender.recipe is not None
    # One engine a budget: what the paper's mode needs of it is in its options.
    probe = Probe(
        {n: registry.make(n, contender.recipe.dhsa, contender.predictor).prefill for n in task.selectors}, task.budgets
    )
    attention.use(answerer.model, Engine(probe, probe))
    asked = {round(i * (len(forced) - 1) / max(1, _DECODE_POSITIONS - 1)) for i in range(_DECODE_POSITIONS)}
    fidelity.feed(answerer.model, ids, 0)
    for index, token in enumerate(forced):
        probe.asks = index in asked
        fidelity.feed(answerer.model, [token], len(ids) + index)
    found = []
    for (kind, name, budget), layers in probe.found.items():
        everyone = [one for calls in layers.values() for one in calls]
        density = sum(one[2] for one in everyone) / sum(one[3] for one in everyone)
        held = tuple(_means([one[0] for one in calls]) for calls in layers.values())
        best = tuple(_means([one[1] for one in calls]) for calls in layers.values())
        one = Measurement(build_of(contender, name), kind, name, budget, task.job, density, tuple(layers), held, best)
        found.append(dataclasses.replace(one, chunk_tokens=probe.chunk_tokens.get(name)))
    # A prompt that a budget holds has no sparse tile; that too is on record, or it would be measured again and again.
    for name in task.selectors:
        for budget in task.budgets:
            for kind in (PREFILL, DECODE):
                if (kind, name, budget) not in probe.found:
                    found.append(Measurement(build_of(contender, name), kind, name, budget, task.job, None))
    return found


def _means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(column) for column in zip(*rows, strict=True))


def _divergences(
    task: Task, answerer: EagerAnswerer, reference: dict[Job, Any], ids: list[int], forced: list[int]
) -> Iterator[Measurement]:
    recipe = task.contender.recipe
    assert recipe is not None
    if task.job not in reference:
        reference.clear()
        attention.use(answerer.model, Engine(Dense(), Dense()))
        reference[task.job] = fidelity.eager_logits(answerer.model, ids, forced, len(ids))
    for name in task.selectors:
        for budget in task.budgets:
            dhsa = dataclasses.replace(recipe.dhsa, budget=budget)
            attention.use(answerer.model, registry.make(name, dhsa, task.contender.predictor), budget)
            with count_attention() as counters:
                logits = fidelity.eager_logits(answerer.model, ids, forced, len(ids))
            found = fidelity.measure(logits, reference[task.job])
            yield Measurement(
                build_of(task.contender, name),
                DIVERGENCE,
                name,
                budget,
                task.job,
                counters.density,
                kl_nats=found.mean_kl_nats,
                top1=found.top1,
            )


def prompt_and_answer(job: Job, count_tokens: TokenCounter) -> tuple[str, str]:
    """The prompt of a RULER job, and its answer as training writes it. Raises EdgerunError for another suite."""
    if job.suite != "ruler":
        raise EdgerunError(f"selectors are measured on RULER's tasks, not on {job.suite!r}")
    try:
        document = ruler.generate_document(job.task, job.length, job.seed, job.index, count_tokens=count_tokens)
    except ValueError as error:
        raise EdgerunError(str(error)) from error
    question = document.questions[0]
    return document.text + question.text, question.completion


@functools.lru_cache(maxsize=1)
def loaded(contender: Contender) -> tuple[EagerAnswerer, dict[Job, Any]]:
    """The contender's model with its attention replaced, and what dense attention gave for the last job."""
    answerer = EagerAnswerer(contender)
    attention.install(answerer.model, Engine(Dense(), Dense()))
    return answerer, {}


def measure_all(
    contender: Contender,
    jobs: Sequence[Job],
    selectors: Sequence[str],
    budgets: Sequence[int],
    *,
    processes: int | None = None,
    ray: str | None = None,
    record: pathlib.Path | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> list[Measurement]:
    """Every selector at every budget on every job, of both kinds; what the record has is not measured again.

    A budget that holds the whole prompt is left out: everyone is dense there. Raises EdgerunError for a record that is
    damaged or that another run writes.
    """
    known = read_record(record)
    missing: list[Task] = []
    wanted: list[tuple[object, ...]] = []
    for job in jobs:
        fitting = [budget for budget in budgets if budget < job.length]
        single = [name for name in selectors if "/" not in name]  # a mixture has no recall of its own
        for kinds, names in (((PREFILL, DECODE), single), ((DIVERGENCE,), list(selectors))):
            keys = {
                (n, b): [(build_of(contender, n), kind, n, b, job) for kind in kinds] for n in names for b in fitting
            }
            wanted += [key for both in keys.values() for key in both]
            for budget in fitting:
                lacking = [n for n in names if any(key not in known for key in keys[n, budget])]
                # Recall shares one dense pass; a divergence is a pass of its own, so a stop should lose few of them.
                size = _DIVERGENCES if kinds == (DIVERGENCE,) else max(1, len(lacking))
                missing += [
                    Task(contender, job, kinds[0], tuple(lacking[i : i + size]), (budget,))
                    for i in range(0, len(lacking), size)
                ]
    missing = [dataclasses.replace(task, contender=contender.absolute()) for task in _merged(missing)]
    done = len([key for key in wanted if key in known])
    with record_lines.writer(record) as append:
        for found in run_anywhere(measure, missing, processes, ray, _describe):
            for one in found:
                known[one.key] = one
                append(one.to_json())
            done += len(found)
            if on_done is not None:
                on_done(done, len(wanted))
    return [known[key] for key in wanted if key in known]


def _describe(task: Task) -> str:
    job = task.job
    return f"{', '.join(task.selectors)}: {task.kind}, {job.task} at {job.length} tokens, sample {job.index}"


def _merged(tasks: Sequence[Task]) -> list[Task]:
    """Tasks of the same prompt, kind and selectors in one: its dense pass is then computed once."""
    together: dict[tuple[Job, str, tuple[str, ...]], list[int]] = {}
    for task in tasks:
        together.setdefault((task.job, task.kind, task.selectors), []).extend(task.budgets)
    return [
        Task(tasks[0].contender, job, kind, names, tuple(budgets)) for (job, kind, names), budgets in together.items()
    ]


def read_record(path: pathlib.Path | None) -> dict[tuple[object, ...], Measurement]:
    """The measurements of a JSONL file. A last line cut short, as a killed run leaves it, is none.

    Raises EdgerunError for another line that is no measurement.
    """
    if path is None:
        return {}
    return {one.key: one for one in record_lines.read(path, Measurement.from_json, "a measurement")}
