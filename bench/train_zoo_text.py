"""Train the text zoo model: RULER's and Needle Threading's tasks in their own templates, and text, up to 8,192 bytes.

The tasks come from edgerun.evaluation, split "train", so training and evaluation share every template and no sample.
Text: the Python standard library's sources and licence texts; one file in twenty, chosen by the hash of its path, is
held out and never trained on. Learning rate: warm-up, constant, then linear to zero over the last part of the time.
Resumable: SIGTERM saves, the same command goes on from the last checkpoint.

    python bench/train_zoo_text.py --out RUN --initial FOLDER --minutes 90 --threads 1
    python bench/train_zoo_text.py --out RUN --export edgerun/zoo/text        # writes the last checkpoint as fp16
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import random
import signal
import string
import sys
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from edgerun.evaluation import needle, ruler, threads
from edgerun.evaluation.held_out_text import is_held_out, library_sources
from edgerun.evaluation.sample import TRAINING_SPLIT, Document, Question, seeded_random

BOS, EOS = 256, 257
CONTEXT = 8192
LAYERS, HEADS, KV_HEADS, HEAD_DIM, ROPE_THETA, NORM_EPS = 6, 4, 2, 64, 500000.0, 1e-6
# Weight of a byte in the loss: answers carry the signal, random haystack has nothing to predict.
FIRST_BYTE, ANSWER, RESTATED, TEXT, QUESTION, HAYSTACK = 4.0, 1.0, 0.5, 0.3, 0.03, 0.01


# ---------------------------------------------------------------- text


def text_files() -> list[pathlib.Path]:
    """Standard library sources and licence texts of this machine, each sorted."""
    licences = [p for p in pathlib.Path("/usr/share/common-licenses").glob("*") if p.is_file() and not p.is_symlink()]
    return library_sources() + sorted(licences)


def read_split(held_out: bool) -> list[bytes]:
    """Files of one side of the split."""
    return [p.read_bytes() for p in text_files() if is_held_out(p) == held_out]


# ---------------------------------------------------------------- samples


@dataclasses.dataclass
class Piece:
    """Token ids and the weight of each in the loss."""

    ids: list[int]
    weights: list[float]

    def add(self, text: str | bytes, weight: float) -> None:
        data = text.encode() if isinstance(text, str) else text
        self.ids += data
        self.weights += [weight] * len(data)

    def add_answer(self, question: Question) -> None:
        """The completion and an end token; the first bytes of each answer weigh more, as they need the retrieval."""
        start = len(self.ids)
        self.add(question.completion, RESTATED if len(question.answers) == 1 else ANSWER)
        for answer in question.answers:
            place = question.completion.rindex(answer)
            for i in range(len(answer)):
                self.weights[start + place + i] = (FIRST_BYTE, 2.0)[i] if i < 2 else ANSWER
        self.ids.append(EOS)
        self.weights.append(RESTATED)


def varied_token(rng: random.Random, kind: str) -> str:
    """Keys and values of the tasks' kinds; some word keys are random letters, so that keys are matched, not known."""
    if kind == "words" and rng.random() < 0.4:
        return "-".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8))) for _ in range(2))
    return needle.random_token(rng, kind)


# Task -> share of the documents of up to 2,048 bytes, and of longer ones: tasks with one question a document teach
# little for what a long one costs.
SHARES = {
    "multikey_2": (0.36, 0.60),
    "noise": (0.11, 0.15),
    "text": (0.05, 0.04),
    "multikey_3": (0.09, 0.07),
    "threads": (0.14, 0.11),
    "vt": (0.12, 0.03),
    "cwe": (0.04, 0.0),
    "fwe": (0.04, 0.0),
    "prose": (0.03, 0.0),
    "grouped": (0.02, 0.0),
}
PLAIN_TEXT_SHARE = (0.18, 0.08)
# Those that the shipped model was trained on: a longer list would draw other samples from the same seed.
THREADS_TASKS = ("single", "multiple", "conditional", "thread_forward", "thread_backward", "thread_random")


class Samples:
    """Draws training sequences: index n of a seed is always the same sequence."""

    def __init__(self, seed: int, most_questions: int = 24) -> None:
        self.seed, self.most_questions = seed, most_questions
        self.text = b"\n".join(read_split(held_out=False))

    def real_lines(self, rng: random.Random, count: int) -> list[str]:
        start = rng.randrange(len(self.text) - 120 * count)
        text = self.text[start : start + 120 * count].decode("utf-8", "ignore")
        return [text[i : i + 90] for i in range(0, len(text), 90)]

    def document(self, rng: random.Random, length: int, index: int) -> Document:
        most = max(1, min(self.most_questions, length // 260))
        questions = rng.randint(max(1, most // 3), most)
        kind = rng.choices(list(SHARES), [short if length <= 2048 else long for short, long in SHARES.values()])[0]
        if kind in ("multikey_2", "multikey_3"):
            task = dataclasses.replace(ruler.NIAH_TASKS["niah_" + kind])
            questions = questions if kind == "multikey_2" else max(1, questions // 2)
            return needle.niah_document(task, length, rng, questions=questions, make_token=varied_token)
        if kind in ("noise", "text", "prose", "grouped"):
            keys = min(rng.choice((1, 1, 2, 4, 8)), length // 512)
            value = rng.choice(("numbers", "numbers", "numbers", "uuids"))
            task = needle.NiahTask("prose" if kind == "prose" else "noise", value_kind=value, keys=keys)
            filler = self.real_lines(rng, length // 90 + 2) if kind == "text" else None
            if kind == "grouped":
                many_values = rng.random() < 0.5
                task = needle.NiahTask("prose", keys=4, values=4 if many_values else 1, queries=1 if many_values else 4)
                questions = 1
            questions = min(questions, 2 * task.keys)
            return needle.niah_document(task, length, rng, questions=questions, filler=filler, make_token=varied_token)
        if kind == "threads":
            task = rng.choice(THREADS_TASKS)
            hops = rng.randint(1, 4)
            groups = max(1, min(questions // 2, length // (220 * hops)))
            return threads.generate_document(
                task, length, self.seed, index, split=TRAINING_SPLIT, needles=hops, questions=groups
            )
        if kind == "vt":
            chains = max(1, min(questions // 2, 4))
            return ruler.variable_tracking(length, rng, chains=chains, example=rng.random() < 0.7)
        kind = "fwe" if length < 2048 else kind  # cwe needs more than 1,024 bytes
        return ruler.generate_document(kind, length, self.seed, index, split=TRAINING_SPLIT)

    def draw(self, length: int, index: int) -> Piece:
        """A sequence of at most length + 1 ids, the beginning-of-sequence id first."""
        rng = seeded_random(TRAINING_SPLIT, "zoo_text", self.seed, length, index)
        piece = Piece([BOS], [0.0])
        if rng.random() < PLAIN_TEXT_SHARE[length > 2048]:
            start = rng.randrange(len(self.text) - length)
            piece.add(self.text[start : start + length], TEXT)
            return piece
        document = None
        while document is None:
            try:
                document = self.document(rng, length, index)
            except ValueError:
                continue  # the drawn questions do not fit this length: draw others
        piece.add(document.text, HAYSTACK)
        for question in document.questions:
            piece.add(question.text, QUESTION)
            piece.add_answer(question)
        del piece.ids[length + 1 :], piece.weights[length + 1 :]
        return piece


def spread_positions(rng: random.Random, count: int, context: int) -> torch.Tensor:
    """Positions 0 to context - 1 with skips at a few random places: distances of a long context at a short one's cost.

    After Zhu et al., arXiv 2309.10400 (PoSE), without its fixed chunks.
    """
    spare = context - count
    cuts = rng.randint(0, 3)
    if spare <= 0 or cuts == 0:
        return torch.arange(count)
    gaps = torch.ones(count, dtype=torch.long)
    gaps[0] = 0
    total = rng.randint(0, spare)
    for _ in range(cuts):
        gaps[rng.randrange(1, count)] += total // cuts
    return gaps.cumsum(0)


# ---------------------------------------------------------------- model


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def logits_of(weights: dict[str, torch.Tensor], ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Llama's forward pass on a dict under Hugging Face names; ids and positions [B, S] -> logits [B, S, vocabulary].

    Written out because transformers reads skips in position_ids as packed sequences and masks across them.
    """
    batch, length = ids.shape
    frequencies = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    angles = positions[..., None].float() * frequencies  # [B, S, D/2]
    angles = torch.cat((angles, angles), dim=-1)[:, None]  # [B, 1, S, D]
    cos, sin = angles.cos(), angles.sin()
    hidden = F.embedding(ids, weights["model.embed_tokens.weight"])

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weights[name], NORM_EPS)

    def heads(x: torch.Tensor, name: str, count: int) -> torch.Tensor:
        return F.linear(x, weights[name]).view(batch, length, count, HEAD_DIM).transpose(1, 2)  # [B, H, S, D]

    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        x = normed(hidden, at + "input_layernorm.weight")
        query = rotate(heads(x, at + "self_attn.q_proj.weight", HEADS), cos, sin)
        key = rotate(heads(x, at + "self_attn.k_proj.weight", KV_HEADS), cos, sin)
        value = heads(x, at + "self_attn.v_proj.weight", KV_HEADS)
        key = key.repeat_interleave(HEADS // KV_HEADS, dim=1)
        value = value.repeat_interleave(HEADS // KV_HEADS, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + F.linear(mixed.transpose(1, 2).flatten(2), weights[at + "self_attn.o_proj.weight"])
        x = normed(hidden, at + "post_attention_layernorm.weight")
        gate = F.silu(F.linear(x, weights[at + "mlp.gate_proj.weight"]))
        up = F.linear(x, weights[at + "mlp.up_proj.weight"])
        hidden = hidden + F.linear(gate * up, weights[at + "mlp.down_proj.weight"])
    return F.linear(normed(hidden, "model.norm.weight"), weights["model.embed_tokens.weight"])


# ---------------------------------------------------------------- training


# (bytes, sequences a step, share of steps early, share of steps later); the last, of --context bytes, follows.
LENGTHS = ((1024, 8, 0.40, 0.12), (2048, 4, 0.40, 0.28), (4096, 2, 0.15, 0.20))
CONTEXT_SHARES = (0.05, 0.40)
EARLY_FRACTION = 0.15
WARM_UP_STEPS = 20


def learning_rate(step: int, elapsed: float, total: float, peak: float, decay: float) -> float:
    """Linear warm-up over steps, constant, then linear to zero over the last `decay` of the time."""
    remaining = max(0.0, 1.0 - elapsed / total)
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, remaining / decay)


def save_checkpoint(path: pathlib.Path, state: dict[str, object]) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "last.pt"
    weights = {k: v.float().requires_grad_() for k, v in load_file(args.initial / "model.safetensors").items()}
    averaged = {k: v.detach().clone() for k, v in weights.items()}
    matrices = [v for v in weights.values() if v.dim() > 1]
    vectors = [v for v in weights.values() if v.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=args.peak, betas=(0.9, 0.97), fused=True)
    step, elapsed_before = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        with torch.no_grad():
            for name, value in state["weights"].items():
                weights[name].copy_(value)
        averaged = state["averaged"]
        optimiser.load_state_dict(state["optimiser"])
        step, elapsed_before = state["step"], state["elapsed"]
    samples = Samples(args.seed, args.most_questions)
    started = saved = time.monotonic()
    total = args.minutes * 60
    log = (args.out / "log.jsonl").open("a")
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    while (elapsed := elapsed_before + time.monotonic() - started) < total and not stopped:
        began = time.monotonic()
        rng = seeded_random(TRAINING_SPLIT, "step", args.seed, step)
        early = elapsed < EARLY_FRACTION * total and not args.no_early
        lengths = [*LENGTHS, (args.context, 1, *CONTEXT_SHARES)]
        shares = [first if early else later for _, _, first, later in lengths]
        if args.context_share is not None and not early:
            rest = sum(shares[:-1]) / (1 - args.context_share)
            shares = [*(share / rest for share in shares[:-1]), args.context_share]
        length, batch = rng.choices([(n, b) for n, b, _, _ in lengths], shares)[0]
        pieces = [samples.draw(length, step * 8 + i) for i in range(batch)]
        width = max(len(p.ids) for p in pieces)
        ids = torch.tensor([p.ids + [EOS] * (width - len(p.ids)) for p in pieces])
        mass = torch.tensor([p.weights + [0.0] * (width - len(p.ids)) for p in pieces])[:, 1:]
        spread = length < args.context and rng.random() < 0.6
        reach = args.context if spread else 0
        positions = torch.stack([spread_positions(rng, width - 1, reach) for _ in pieces])
        rate = learning_rate(step, elapsed, total, args.peak, args.decay)
        for group in optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            logits = logits_of(weights, ids[:, :-1], positions)
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(mass.shape)
        # Each sequence counts alike, however many answers it holds.
        loss = ((losses * mass).sum(1) / mass.sum(1).clamp(min=1e-6)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            keep = min(0.98, step / (step + 10))
            for name, value in averaged.items():
                value.lerp_(weights[name], 1 - keep)
            answer = mass >= ANSWER
            right = (((logits.argmax(-1) == ids[:, 1:]) & answer).sum() / answer.sum()).item() if answer.any() else None
            first = mass >= FIRST_BYTE
            found = (((logits.argmax(-1) == ids[:, 1:]) & first).sum() / first.sum()).item() if first.any() else None
            plain = (mass - TEXT).abs() < 1e-6
            bits = (losses[plain].mean() / math.log(2)).item() if plain.any() else None
        row = {
            "step": step,
            "elapsed_s": round(elapsed),
            "length": length,
            "loss": round(loss.item(), 4),
            "answer_bytes_right": right,
            "first_bytes_right": found,
            "text_bits_per_byte": bits,
            "gradient_norm": round(norm.item(), 2),
            "rate": rate,
            "step_s": round(time.monotonic() - began, 2),
        }
        log.write(json.dumps(row) + "\n")
        log.flush()
        if time.monotonic() - saved > 180:
            saved = time.monotonic()
            _save(checkpoint, weights, averaged, optimiser, step, elapsed_before + saved - started)
    _save(checkpoint, weights, averaged, optimiser, step, elapsed_before + time.monotonic() - started)


def _save(
    path: pathlib.Path,
    weights: dict[str, torch.Tensor],
    averaged: dict[str, torch.Tensor],
    optimiser: torch.optim.Optimizer,
    step: int,
    elapsed: float,
) -> None:
    state = {
        "weights": {k: v.detach() for k, v in weights.items()},
        "averaged": averaged,
        "optimiser": optimiser.state_dict(),
        "step": step,
        "elapsed": elapsed,
    }
    save_checkpoint(path, state)


def export(args: argparse.Namespace) -> None:
    """Write the checkpoint's weights as fp16 safetensors into a folder that has config and tokenizer already."""
    state = torch.load(args.out / "last.pt", weights_only=True)
    chosen = state["averaged" if args.averaged else "weights"]
    tensors = {name: value.to(torch.float16).contiguous() for name, value in chosen.items()}
    save_file(tensors, args.export / "model.safetensors", metadata={"format": "pt"})
    print(f"step {state['step']}, {sum(t.numel() for t in tensors.values()):,} parameters -> {args.export}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of checkpoint and log")
    parser.add_argument("--initial", type=pathlib.Path, help="folder whose model.safetensors to start from")
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", type=float, default=5e-4, help="highest learning rate")
    parser.add_argument("--decay", type=float, default=0.4, help="last part of the time, in which the rate falls to 0")
    parser.add_argument("--context-share", type=float, help="later share of the steps at the full context")
    parser.add_argument(
        "--context", type=int, default=CONTEXT, help="bytes of the longest sequences, questions included"
    )
    parser.add_argument(
        "--no-early", action="store_true", help="later shares from the start: the model is trained already"
    )
    parser.add_argument("--bf16", action="store_true", help="matrix products and attention in bfloat16 (autocast)")
    parser.add_argument("--most-questions", type=int, default=24, help="fewer leave more room for needles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=pathlib.Path, help="write the checkpoint there instead of training")
    parser.add_argument("--averaged", action="store_true", help="export the moving average of the weights")
    args = parser.parse_args()
    export(args) if args.export else train(args)


if __name__ == "__main__":
    main()
