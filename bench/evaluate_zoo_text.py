"""Evaluate a byte-level Hugging Face folder: tasks by string match with dense greedy decoding, and perplexity.

Every sample has a haystack of its own. Outputs go to a JSONL file as they come; the same command goes on from there.
Perplexity: the files that bench/train_zoo_text.py holds out, in windows of the given lengths, all bytes scored.

    python bench/evaluate_zoo_text.py edgerun/zoo/text --raw RUN/raw.jsonl --cells niah_single_1:2048,4096,8192:200 \\
        vt:2048:50 --perplexity 2048 8192 --result bench/results/zoo_text.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pathlib
import platform
import subprocess
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from edgerun.evaluation import ruler, threads
from edgerun.evaluation.sample import Sample
from edgerun.evaluation.statistics import wilson_interval

ROOT = pathlib.Path(__file__).resolve().parents[1]
EOS = 257
# Held-out bytes scored: so many windows, spread evenly; shorter windows are parts of these.
PERPLEXITY_WINDOWS, PERPLEXITY_WINDOW_BYTES = 12, 8192


def make_sample(task: str, length: int, seed: int, index: int) -> Sample:
    """A RULER task, or a threads task written as `threads_<name>`."""
    if task.startswith("threads_"):
        return threads.generate(task.removeprefix("threads_"), length, seed, index)
    return ruler.generate(task, length, seed, index)


@torch.inference_mode()
def answer(model: torch.nn.Module, tokenizer, sample: Sample) -> str:
    """Greedy continuation of the prompt up to end-of-sequence or `max_new_tokens`."""
    ids = torch.tensor([tokenizer(sample.prompt)["input_ids"]])
    cache = DynamicCache(config=model.config)
    found: list[int] = []
    for _ in range(sample.max_new_tokens):
        token = int(model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax())
        if token == EOS:
            break
        found.append(token)
        ids = torch.tensor([[token]])
    return tokenizer.decode(found, skip_special_tokens=True)


def run_cells(
    model: torch.nn.Module,
    tokenizer,
    cells: list[tuple[str, int, int]],
    seed: int,
    raw: pathlib.Path,
    weights: str,
    part: tuple[int, int],
) -> None:
    """Answer every sample that `raw` does not hold yet; all cells grow together, so that a stop leaves all usable.

    part: (i, n) answers only the indices that leave i when divided by n, so that n processes share one file.
    """
    done = {(row["task"], row["length"], row["index"]) for row in read_rows(raw, seed, weights)}
    jobs = [(index // 20, task, length, index) for task, length, samples in cells for index in range(samples)]
    jobs = [job for job in jobs if job[1:] not in done and job[3] % part[1] == part[0]]
    with raw.open("a") as out:
        for _, task, length, index in tqdm(sorted(jobs, key=lambda job: job[0])):
            sample = make_sample(task, length, seed, index)
            output = answer(model, tokenizer, sample)
            row = {
                "task": task,
                "length": length,
                "seed": seed,
                "index": index,
                "weights": weights,
                "score": ruler.score(sample, output),
                "answers": sample.answers,
                "output": output,
            }
            out.write(json.dumps(row) + "\n")
            out.flush()


def read_rows(raw: pathlib.Path, seed: int, weights: str) -> list[dict]:
    """Rows of this seed and these weights (a SHA-256)."""
    rows = [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []
    return [row for row in rows if (row["seed"], row["weights"]) == (seed, weights)]


@torch.inference_mode()
def bits_per_byte(model: torch.nn.Module, length: int) -> dict[str, float]:
    """Mean loss in bits on held-out text, read in windows of `length` bytes; every length scores the same bytes."""
    from train_zoo_text import BOS, read_split

    text = b"\n".join(read_split(held_out=True))
    stride = (len(text) - PERPLEXITY_WINDOW_BYTES) // (PERPLEXITY_WINDOWS - 1)
    starts = [n * stride + i for n in range(PERPLEXITY_WINDOWS) for i in range(0, PERPLEXITY_WINDOW_BYTES, length)]
    windows = [text[i : i + length] for i in starts]
    total = 0.0
    for window in windows:
        ids = torch.tensor([[BOS, *window]])
        logits = model(ids[:, :-1], use_cache=False).logits[0].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    count = len(windows) * length
    bits = total / count / math.log(2)
    return {"length": length, "bytes": count, "bits_per_byte": round(bits, 4), "perplexity_per_byte": round(2**bits, 4)}


def table(rows: list[dict], cells: list[tuple[str, int, int]]) -> list[dict]:
    """One record a cell: n, samples with every answer found, Wilson's interval, RULER's mean score, the 0/1 array."""
    records = []
    for task, length, samples in cells:
        scores = {r["index"]: r["score"] for r in rows if (r["task"], r["length"]) == (task, length)}
        whole = [int(scores[i] == 1.0) for i in range(samples) if i in scores]
        if not whole:
            continue
        interval = wilson_interval(sum(whole), len(whole))
        mean = sum(scores[i] for i in range(samples) if i in scores) / len(whole)
        records.append(
            {
                "task": task,
                "length": length,
                "n": len(whole),
                "right": sum(whole),
                "wilson_95": [round(interval.low, 4), round(interval.high, 4)],
                "mean_score": round(mean, 4),
                "samples": whole,
            }
        )
        print(
            f"{task:24} {length:5} {sum(whole):4}/{len(whole):<4} {100 * interval.estimate:5.1f} % "
            f"[{100 * interval.low:5.1f}, {100 * interval.high:5.1f}]  mean score {100 * mean:5.1f}"
        )
    return records


def parse_cells(texts: list[str]) -> list[tuple[str, int, int]]:
    """`task:length,length:samples` -> (task, length, samples) for each length."""
    cells = []
    for text in texts:
        task, lengths, samples = text.split(":")
        cells += [(task, int(length), int(samples)) for length in lengths.split(",")]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument(
        "--cells", nargs="*", default=[], help="task:length[,length]:samples; threads tasks as threads_NAME"
    )
    parser.add_argument("--raw", type=pathlib.Path, required=True, help="JSONL of samples; reused when it is there")
    parser.add_argument("--result", type=pathlib.Path, help="write the table, machine and command there")
    parser.add_argument("--perplexity", type=int, nargs="*", default=[], help="window lengths in bytes")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", default="0/1", help="i/n: answer the indices that leave i when divided by n")
    parser.add_argument("--report", action="store_true", help="answer nothing; report what the raw file holds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    cells = parse_cells(args.cells)
    weights = hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest()
    if not args.report:
        part, parts = (int(number) for number in args.part.split("/"))
        run_cells(model, tokenizer, cells, args.seed, args.raw, weights, (part, parts))
    rows = read_rows(args.raw, args.seed, weights)
    perplexity = [r["value"] for r in rows if r["task"] == "perplexity" and r["length"] in args.perplexity]
    for length in sorted(set(args.perplexity) - {value["length"] for value in perplexity}):
        value = bits_per_byte(model, length)
        row = {
            "task": "perplexity",
            "length": length,
            "seed": args.seed,
            "index": 0,
            "weights": weights,
            "value": value,
        }
        with args.raw.open("a") as out:
            out.write(json.dumps(row) + "\n")
        perplexity.append(value)
    for value in perplexity:
        print(value)
    records = table(read_rows(args.raw, args.seed, weights), cells)
    if args.result:
        args.result.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "model": "edgerun/zoo/text",
            "weights_sha256": weights,
            "command": "python bench/evaluate_zoo_text.py "
            + " ".join(a for a in sys.argv[1:] if a != "--report").replace(str(args.raw), args.raw.name),
            "commit": subprocess.run(
                ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
            ).stdout.strip(),
            "machine": {
                "processor": processor_name(),
                "cores": os.cpu_count(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "threads": args.threads,
                "dtype": "float32",
            },
            "seed": args.seed,
            "split": "evaluation",
            "attention": "dense",
            "decoding": "greedy",
            "cells": records,
            "perplexity": perplexity,
        }
        args.result.write_text(json.dumps(result, indent=1) + "\n")


def processor_name() -> str:
    """The processor's name as Linux gives it, or what Python knows."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
