"""First token, end to end: a dense and a sparse edgerun bundle against the same checkpoint on ExecuTorch's own ops.

    python bench/workloads/first_token.py --work FOLDER --checkpoint zoo:text --quantize none --lengths 512
    python bench/workloads/first_token.py --work FOLDER --checkpoint llama-1b --quantize 8da4w --lengths 8192 16384

`llama-1b` is a random checkpoint in Llama 3.2 1B's shape (make_checkpoint.py); a path is any Llama-like folder. For
each length three programs are built for just that context, each in a process of its own: the peer (peer_program.py),
edgerun dense, and edgerun with DHSA. Before anything is timed the peer and dense edgerun must give the same logits.
Then each runs in fresh processes, in turn, and every row goes to the result file when it is complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from bench.harness import RESULTS, ResultFile, Row, prove
from bench.workloads.make_checkpoint import LlamaShape, make_checkpoint
from edgerun import zoo
from edgerun.bundle import Bundle
from edgerun.checkpoint import Checkpoint
from edgerun.compare import relative_l2, tolerance
from edgerun.errors import EdgerunError
from edgerun.evaluation.fidelity import NOISE_ROOM, Noise
from edgerun.machine import package_versions
from edgerun.recipe import DhsaOptions, Recipe

FOLDER = pathlib.Path(__file__).resolve().parent
SIDES = ("peer", "dense", "dhsa")  # the first is the baseline
PROOF_TOKENS = 1024  # longest prompt of the proof before the first timing; every timed prompt is compared too


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured: the settings that a result file belongs to."""

    checkpoint: str
    quantize: str
    lengths: tuple[int, ...]
    budget: int
    prefill_slice: int
    new_tokens: int
    threads: int
    repeats: int
    max_context: int | None  # None: each length's own

    def recipe(self, side: str, length: int) -> Recipe:
        """The recipe of one side's program for one length."""
        context = self.max_context or -(-(length + self.new_tokens) // 64) * 64
        attention = "dhsa" if side == "dhsa" else "dense"
        dhsa = DhsaOptions(budget=self.budget)
        return Recipe(attention, dhsa, context, min(self.prefill_slice, context), self.quantize)  # type: ignore[arg-type]


def run(plan: Plan, work: pathlib.Path, results: ResultFile) -> None:
    """Measure every length that the results lack. Raises ParityError when peer and dense edgerun disagree."""
    source = find_checkpoint(plan.checkpoint, work)
    for length in plan.lengths:
        key = {"kind": "first_token", "checkpoint": plan.checkpoint, "quantize": plan.quantize, "length": length}
        row = results.find(key)
        if row is None:
            programs = {side: build(side, source, plan.recipe(side, length), work) for side in SIDES}
            load = os.getloadavg()[0]
            facts = {"max_context": plan.recipe("peer", length).max_context, "load_average_at_start": load}
            row = {**key, **facts, "sides": measure(plan, programs, length, work)}
            results.add(row)
        print("\n".join(lines(row)), flush=True)


def find_checkpoint(name: str, work: pathlib.Path) -> pathlib.Path:
    """The folder of `zoo:NAME`, of `llama-1b`, which is made in `work` when missing, or of a path."""
    if name == "llama-1b":
        make_checkpoint(work / "llama-1b", LlamaShape())
        return work / "llama-1b"
    return zoo.zoo_model_path(name.removeprefix("zoo:")) if name.startswith("zoo:") else pathlib.Path(name)


def build(side: str, source: pathlib.Path, recipe: Recipe, work: pathlib.Path) -> pathlib.Path:
    """The side's program in `work`, made when it is not there; a name says everything that it depends on."""
    versions = package_versions(("torch", "executorch", "transformers", "torchao"))
    code = (FOLDER / "peer_program.py").read_text(encoding="utf-8") if side == "peer" else ""
    text = json.dumps([recipe.hash(Checkpoint.open(source).sha256()), versions, code])
    name = f"{side}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    out = work / (f"{name}.pte" if side == "peer" else f"{name}.edgerun")
    options = ["--quantize", recipe.quantize, "--max-context", str(recipe.max_context)]
    options += ["--prefill-slice", str(recipe.prefill_slice)]
    if side == "peer":
        if out.is_file():
            return out
        command = [str(FOLDER / "peer_program.py"), str(source), str(out), *options]
    else:  # export itself knows whether the bundle there is this build
        options += ["--attention", recipe.attention, "--overwrite"]
        options += ["--budget", str(recipe.dhsa.budget)] if side == "dhsa" else []
        command = ["-m", "edgerun.cli", "export", str(source), "-o", str(out), *options]
    print(f"building {out.name}", flush=True)
    subprocess.run([sys.executable, *command], check=True, env=_environment(), stdout=subprocess.DEVNULL)
    return out


def measure(plan: Plan, programs: dict[str, pathlib.Path], length: int, work: pathlib.Path) -> dict[str, Any]:
    """Every side's runs, in turn, after the proof; keyed by side."""
    generator = random.Random(0)
    prompt = [generator.randrange(256) for _ in range(length)]
    limit = proof_limit(plan, programs["dense"])
    short = prompt[:PROOF_TOKENS]
    _, expected = child(plan, "peer", programs["peer"], short, 1, work)
    _, given = child(plan, "dense", programs["dense"], short, 1, work)
    error = relative_l2(given, expected)
    prove(f"dense edgerun against the peer, {len(short)} tokens", error, limit)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    errors: dict[str, float] = {}
    for _ in range(plan.repeats):
        answers = {}
        for side in SIDES:
            measured, answers[side] = child(plan, side, programs[side], prompt, plan.new_tokens, work)
            runs[side].append(measured)
        errors = {side: relative_l2(answers[side], answers["peer"]) for side in SIDES}
        prove(f"dense edgerun against the peer, {length} tokens", errors["dense"], limit)
    return {
        side: {
            "program_bytes": _size(programs[side]),
            "relative_l2_against_peer": errors[side],  # of dhsa: what sparsity changes, no error
            "proof_relative_l2": error if side == "dense" else None,
            **{name: statistics.median(one[name] for one in runs[side]) for name in _MEDIANS},
            "first_token_minimum_seconds": min(one["first_token_seconds"] for one in runs[side]),
            "runs": runs[side],
        }
        for side in SIDES
    }


def proof_limit(plan: Plan, bundle: pathlib.Path) -> float:
    """How far two right computations of the model may part, relative L2; a quantised one has noise of its own."""
    if plan.quantize == "none":
        return tolerance("logits_fp32")
    noise = Noise.from_manifest(Bundle.open(bundle).manifest)
    return max(tolerance("quantized_parity_logits"), 0.0 if noise is None else NOISE_ROOM * noise.relative_l2)


_MEDIANS = ("first_token_seconds", "decode_ms_per_token", "load_seconds", "peak_rss_bytes", "peak_over_start_bytes")


def child(
    plan: Plan, side: str, program: pathlib.Path, prompt: list[int], new_tokens: int, work: pathlib.Path
) -> tuple[dict[str, Any], np.ndarray]:
    """One run in a fresh process: what it measured, and the logits of the prompt's last token."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = pathlib.Path(name)
        request = {
            "side": "peer" if side == "peer" else "edgerun",
            "program": str(program),
            "prompt": prompt,
            "prefill_slice": plan.prefill_slice,
            "new_tokens": new_tokens,
            "threads": plan.threads,
            "logits": str(folder / "logits.npy"),
            "answer": str(folder / "answer.json"),
        }
        (folder / "request.json").write_text(json.dumps(request))
        command = [sys.executable, str(FOLDER / "first_token_child.py"), str(folder / "request.json")]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise EdgerunError(f"{side} ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        measured: dict[str, Any] = json.loads((folder / "answer.json").read_text())
        if measured["threads"] != plan.threads:
            raise EdgerunError(f"{side} ran on {measured['threads']} threads, not {plan.threads}")
        return measured, np.load(folder / "logits.npy")


def lines(row: Row) -> list[str]:
    """The row as a table."""
    peer = row["sides"]["peer"]
    text = [f"\n{row['checkpoint']}, {row['quantize']}, {row['length']} tokens, context {row['max_context']}"]
    for side, one in row["sides"].items():
        text.append(
            f"  {side:<6} first token {one['first_token_seconds']:8.2f} s "
            f"(x{peer['first_token_seconds'] / one['first_token_seconds']:5.2f}), "
            f"decode {one['decode_ms_per_token']:8.2f} ms/token "
            f"(x{peer['decode_ms_per_token'] / one['decode_ms_per_token']:5.2f}), "
            f"peak {one['peak_rss_bytes'] / 2**20:7.0f} MiB, {one['peak_over_start_bytes'] / 2**20:6.0f} its own, "
            f"logits against peer {one['relative_l2_against_peer']:.1e}"
        )
    return text


def _size(path: pathlib.Path) -> int:
    program = path if path.is_file() else path / "programs" / "text.pte"
    return program.stat().st_size


def _environment() -> dict[str, str]:
    paths = [str(FOLDER.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="a folder outside the repository for programs")
    parser.add_argument("--checkpoint", default="zoo:text", help="zoo:NAME, llama-1b, or a folder")
    parser.add_argument("--quantize", choices=("none", "8da4w"), default="none")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--prefill-slice", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=17, help="the first among them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-context", type=int, help="one context for all lengths, instead of each length's own")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--fresh", action="store_true", help="measure every row anew")
    values = parser.parse_args(arguments)
    plan = Plan(
        **{f.name: getattr(values, f.name) for f in dataclasses.fields(Plan) if f.name != "lengths"},
        lengths=tuple(values.lengths),
    )
    name = pathlib.PurePath(values.checkpoint.replace(":", "_")).name
    output = values.output or RESULTS / f"first_token_{name}_{values.quantize}.json"
    values.work.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python", "bench/workloads/first_token.py", *(arguments or sys.argv[1:])])
    results = ResultFile(output, command, dataclasses.asdict(plan), fresh=values.fresh)
    try:
        run(plan, values.work, results)
    except EdgerunError as error:
        sys.exit(f"error: {error}")
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
