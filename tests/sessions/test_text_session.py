"""TextSession against the eager model, and everything that a caller can do wrong."""

from __future__ import annotations

import math
import os
import pathlib
import signal
import threading

import numpy as np
import pytest
import torch
import transformers

from edgerun import compare
from edgerun.bundle import SCHEMA_VERSION
from edgerun.errors import BundleError, EdgerunError
from edgerun.models import causal_lm
from edgerun.sessions.text import TextSession
from tests.shared_bundle import BUDGET, RECIPE, SharedBundle, changed_bundle, replace_program

# Chi-square beyond this many standard deviations over its mean: 5 is one in about a million; the seeds are fixed.
CHI_SQUARE_DEVIATIONS = 5.0


def random_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def greedy_eager(model: causal_lm.CausalLM, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the eager model, prompt in the recipe's slices."""
    model.reset()
    with torch.inference_mode():
        for start in range(0, len(prompt), RECIPE.prefill_slice):
            logits = model(torch.tensor([prompt[start : start + RECIPE.prefill_slice]]), torch.tensor([start]))
        tokens = [int(logits.argmax())]
        while len(tokens) < count:
            position = torch.tensor([len(prompt) + len(tokens) - 1])
            tokens.append(int(model(torch.tensor([tokens[-1:]]), position).argmax()))
    return tokens


def test_greedy_tokens_are_transformers_own(tiny: SharedBundle, session: TextSession) -> None:
    prompt = random_ids(60)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny.checkpoint, attn_implementation="eager", dtype=torch.float32
    )
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(BUDGET - len(prompt)):  # within the budget attention is dense
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    generation = session.generate(prompt, max_new_tokens=BUDGET - len(prompt), stop_ids=[])
    assert generation.tokens == ids[0, len(prompt) :].tolist()
    assert generation.finish == "length"


def test_greedy_tokens_are_the_eager_models_when_sparse(tiny: SharedBundle, session: TextSession) -> None:
    prompt = random_ids(200, seed=1)
    model = causal_lm.load(tiny.checkpoint, RECIPE)
    generation = session.generate(prompt, max_new_tokens=30, stop_ids=[])
    assert generation.tokens == greedy_eager(model, prompt, 30)
    assert generation.stats.attended_pairs < generation.stats.causal_pairs


def test_slices_do_not_change_the_answer(bundle: pathlib.Path, session: TextSession, tmp_path: pathlib.Path) -> None:
    prompt = random_ids(237, seed=2)

    def shorten(manifest: dict) -> None:
        manifest["context"]["prefill_slice"] = 23  # cut at 16, the tile

    other = TextSession(changed_bundle(bundle, tmp_path / "short slices.edgerun", shorten))
    assert (session.forward(prompt, 0) == other.forward(prompt, 0)).all()
    assert session.stats.attended_pairs == other.stats.attended_pairs < session.stats.causal_pairs


def test_dense_tail_is_a_call_of_its_own(bundle: pathlib.Path, session: TextSession, tmp_path: pathlib.Path) -> None:
    prompt, tail = random_ids(190, seed=3), 21

    def set_tail(manifest: dict) -> None:
        manifest["recipe"]["dhsa"]["dense_tail"] = tail

    other = TextSession(changed_bundle(bundle, tmp_path / "tail.edgerun", set_tail))
    session.forward(prompt[:-tail], 0)
    expected = session.forward(prompt[-tail:], len(prompt) - tail)
    assert (other.forward(prompt, 0) == expected).all()
    assert (other.forward(prompt[:5], 0) == session.forward(prompt[:5], 0)).all()  # shorter than the tail


def test_a_conversation_is_one_prompt(session: TextSession) -> None:
    first, second = random_ids(20, seed=4), random_ids(25, seed=5)
    before = session.generate(first, max_new_tokens=6, stop_ids=[])
    assert session.cached_tokens == 25  # the sixth token joins with the next call
    after = session.generate(second, max_new_tokens=6, stop_ids=[])
    session.reset()
    whole = session.generate([*first, *before.tokens, *second], max_new_tokens=6, stop_ids=[])
    assert after.tokens == whole.tokens


def test_reset_forgets(session: TextSession) -> None:
    prompt = random_ids(30, seed=6)
    first = session.generate(prompt, max_new_tokens=8, stop_ids=[])
    session.reset()
    assert session.cached_tokens == 0
    assert session.generate(prompt, max_new_tokens=8, stop_ids=[]).tokens == first.tokens


def test_forward_drops_what_comes_after(session: TextSession) -> None:
    prompt = random_ids(180, seed=7)
    expected = session.forward(prompt, 0)
    session.reset()
    session.forward(prompt[:128], 0)
    session.forward(random_ids(70, seed=8), 128)
    assert (session.forward(prompt[128:], 128) == expected).all()
    assert session.cached_tokens == 180


def test_a_seed_gives_its_tokens_again(session: TextSession) -> None:
    def sample(seed: int) -> list[int]:
        session.reset()
        return session.generate(
            [1, 2, 3], max_new_tokens=40, temperature=1.0, top_p=0.95, seed=seed, stop_ids=[]
        ).tokens

    assert sample(11) == sample(11)
    assert sample(11) != sample(12)


def test_sampled_tokens_follow_the_logits(session: TextSession) -> None:
    prompt, draws, temperature, top_k = random_ids(8, seed=9), 400, 1.5, 20
    logits = session.forward(prompt, 0).astype(np.float64)
    kept = np.argsort(-logits, kind="stable")[:top_k]
    expected = np.exp(compare.log_softmax(logits[kept] / temperature)) * draws
    counts = dict.fromkeys(kept.tolist(), 0)
    for seed in range(draws):
        session.reset()
        token = session.generate(prompt, max_new_tokens=1, temperature=temperature, top_k=top_k, seed=seed).tokens[0]
        counts[token] += 1  # a KeyError is a token beyond the top k
    observed = np.array([counts[token] for token in kept.tolist()])
    likely = expected >= 5
    observed = np.append(observed[likely], observed[~likely].sum())
    expected = np.append(expected[likely], expected[~likely].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    assert ((observed - expected) ** 2 / expected).sum() <= freedom + CHI_SQUARE_DEVIATIONS * math.sqrt(2 * freedom)


def test_stop_tokens(session: TextSession) -> None:
    prompt = random_ids(30, seed=10)
    tokens = session.generate(prompt, max_new_tokens=10, stop_ids=[]).tokens
    session.reset()
    stopped = session.generate(prompt, max_new_tokens=10, stop_ids=[tokens[4]])
    assert stopped.tokens == tokens[: tokens.index(tokens[4]) + 1]
    assert stopped.finish == "stop"


def test_the_bundles_end_token_stops(bundle: pathlib.Path, session: TextSession, tmp_path: pathlib.Path) -> None:
    prompt = random_ids(30, seed=10)
    first = session.generate(prompt, max_new_tokens=1, stop_ids=[]).tokens[0]
    other = TextSession(
        changed_bundle(bundle, tmp_path / "eos.edgerun", lambda manifest: manifest["tokens"].update(eos_ids=[first]))
    )
    generation = other.generate(prompt)
    assert (generation.tokens, generation.finish) == ([first], "eos")


def test_text_goes_through_the_bundles_tokenizer(session: TextSession) -> None:
    generation = session.generate("some text", max_new_tokens=5, stop_ids=[])
    assert generation.text == session.tokenizer.decode(generation.tokens)
    assert generation.stats.prompt_tokens == len(session.tokenizer.encode("some text").ids)


def test_a_full_context_ends_the_run(session: TextSession) -> None:
    generation = session.generate(random_ids(250), max_new_tokens=100, stop_ids=[])
    assert len(generation.tokens) == 256 - 250 + 1  # the last one needs no room
    assert (generation.finish, session.cached_tokens) == ("length", 256)


def test_nothing_new_only_reads_the_prompt(session: TextSession) -> None:
    generation = session.generate(random_ids(10), max_new_tokens=0)
    assert (generation.tokens, generation.text, session.cached_tokens) == ([], "", 10)
    assert math.isnan(generation.stats.first_token_ms)


@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        ([], {}, "the prompt has 0 tokens"),
        ([1] * 257, {}, "the prompt has 257 tokens after 6 cached; the context holds 256"),
        ([1, 264], {}, "prompt token 1 is 264; the vocabulary has ids 0 to 263"),
        ([-1], {}, "prompt token 0 is -1"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([1], {"temperature": -0.5}, "temperature is -0.5"),
        ([1], {"top_p": 0.0}, "top_p is 0.0"),
        ([1], {"top_k": -3}, "top_k is -3"),
        ([1], {"seed": -1}, "seed is -1"),
        ([1], {"stop_ids": [999]}, "stop token 0 is 999"),
    ],
)
def test_bad_arguments_leave_the_session_as_it_was(session: TextSession, ids: list, options: dict, said: str) -> None:
    expected = session.generate([5, 6, 7], max_new_tokens=3, stop_ids=[])
    with pytest.raises(EdgerunError, match="^" + said):
        session.generate(ids, **options)
    assert session.cached_tokens == 5
    again = session.generate([8], max_new_tokens=3, stop_ids=[]).tokens
    session.reset()
    assert session.generate([5, 6, 7, *expected.tokens, 8], max_new_tokens=3, stop_ids=[]).tokens == again


def test_a_prompt_that_no_longer_fits_says_what_is_cached(session: TextSession) -> None:
    session.generate(random_ids(200), max_new_tokens=0)
    with pytest.raises(EdgerunError, match=r"100 tokens after 200 cached; the context holds 256.*reset"):
        session.generate(random_ids(100))


def test_forward_beyond_what_is_cached(session: TextSession) -> None:
    session.forward([1, 2, 3], 0)
    with pytest.raises(EdgerunError, match="input_pos is 4; it must be 0 to 3"):
        session.forward([1], 4)


def test_cancel_from_another_thread(session: TextSession) -> None:
    started, asked = threading.Event(), threading.Event()

    def cancel() -> None:
        started.wait(60)
        session.cancel()
        asked.set()

    def on_token(_: int) -> None:  # however fast the model is, the run goes on only when it was cancelled
        started.set()
        asked.wait(60)

    canceller = threading.Thread(target=cancel)
    canceller.start()
    generation = session.generate([1, 2, 3], max_new_tokens=250, stop_ids=[], on_token=on_token)
    canceller.join()
    assert generation.finish == "cancelled"
    assert 1 <= len(generation.tokens) < 250
    assert session.cached_tokens == 3 + len(generation.tokens) - 1


def test_cancel_without_a_run_does_nothing(session: TextSession) -> None:
    session.cancel()
    assert session.generate([1, 2, 3], max_new_tokens=4, stop_ids=[]).finish == "length"


def test_a_second_call_at_the_same_time_is_refused(session: TextSession) -> None:
    def interfere(_: int) -> None:
        with pytest.raises(EdgerunError, match="running another call"):
            session.reset()
        with pytest.raises(EdgerunError, match="running another call"):
            session.generate([1])

    assert len(session.generate([1, 2, 3], max_new_tokens=2, stop_ids=[], on_token=interfere).tokens) == 2


def test_what_on_token_raises_comes_back(session: TextSession) -> None:
    def refuse(token: int) -> None:
        raise ValueError(f"not {token}")

    with pytest.raises(ValueError, match="not "):
        session.generate([1, 2, 3], on_token=refuse)
    session.reset()
    assert session.generate([1, 2, 3], max_new_tokens=2, stop_ids=[]).finish == "length"


def test_interrupt_ends_a_run(session: TextSession) -> None:
    seen: list[int] = []

    def interrupt(token: int) -> None:
        seen.append(token)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        session.generate([1, 2, 3], max_new_tokens=250, stop_ids=[], on_token=interrupt)
    assert len(seen) == 3


def test_statistics_are_in_order(session: TextSession) -> None:
    stats = session.generate(random_ids(200), max_new_tokens=5, stop_ids=[]).stats
    assert (stats.prompt_tokens, stats.generated_tokens) == (200, 5)
    times = [stats.model_load_start_ms, stats.model_load_end_ms, stats.inference_start_ms]
    times += [stats.prompt_eval_end_ms, stats.first_token_ms, stats.inference_end_ms]
    assert times == sorted(times)
    assert 0 < stats.aggregate_sampling_time_ms < stats.inference_end_ms - stats.prompt_eval_end_ms
    assert stats.peak_rss_bytes > 1 << 20
    pairs = sum(range(1, 205))  # causal pairs of 204 tokens, the fifth new one is not fed
    assert stats.causal_pairs == pairs * 2 * 2  # layers, KV heads
    assert session.stats == stats


def test_threads_are_the_process_pools(loaded: TextSession, bundle: pathlib.Path) -> None:
    assert loaded.threads == 1
    with pytest.raises(EdgerunError, match="threads is 2, but an open session uses the process's pool of 1"):
        TextSession(bundle, threads=2)
    with pytest.raises(EdgerunError, match="threads is 0"):
        TextSession(bundle, threads=0)


def future_schema(manifest: dict) -> None:
    manifest["schema_version"] += 1


def older_schema(manifest: dict) -> None:
    manifest["schema_version"] -= 1


def other_kind(manifest: dict) -> None:
    manifest["kind"] = "video"


def path_that_leaves(manifest: dict) -> None:
    manifest["files"]["../outside"] = {"bytes": 1, "sha256": "0"}


def absolute_path(manifest: dict) -> None:
    manifest["files"]["/etc/hostname"] = {"bytes": 1, "sha256": "0"}


def missing_file(manifest: dict) -> None:
    manifest["files"]["programs/more.pte"] = {"bytes": 1, "sha256": "0"}


def other_build(manifest: dict) -> None:
    manifest["build"] = "0" * 64


def foreign_operator(manifest: dict) -> None:
    manifest["programs"][0]["operators"].append("acme::turbo")


def no_context(manifest: dict) -> None:
    del manifest["context"]["max_context"]


def negative_tail(manifest: dict) -> None:
    manifest["recipe"]["dhsa"]["dense_tail"] = -1000


def name_of_two_lines(manifest: dict) -> None:
    manifest["programs"][0]["file"] = "one\ntwo"


def huge_vocabulary(manifest: dict) -> None:
    manifest["tokens"]["vocab_size"] = 2**62


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (older_schema, f"reads version {SCHEMA_VERSION}: export the bundle again"),
        (future_schema, f"schema version {SCHEMA_VERSION + 1}; this edgerun reads version {SCHEMA_VERSION}: update"),
        (other_kind, "kind 'video'"),
        (path_that_leaves, "names '../outside', which leaves the bundle folder"),
        (absolute_path, "names '/etc/hostname', which leaves the bundle folder"),
        (missing_file, "'programs/more.pte' of manifest.json is not in"),
        (other_build, "is not of the manifest's build 0000"),
        (foreign_operator, "needs the operator acme::turbo, which no loaded library defines: load the library"),
        (no_context, "no usable 'context.max_context'"),
        (negative_tail, "says recipe.dhsa.dense_tail = -1000; it must be at least 0"),
        (name_of_two_lines, "no size and hash for 'one two'"),
        (huge_vocabulary, f"does not return the logits of the manifest's {2**62} tokens"),
    ],
)
def test_a_manifest_that_cannot_be_trusted(
    bundle: pathlib.Path, tmp_path: pathlib.Path, change: object, said: str
) -> None:
    with pytest.raises(BundleError) as caught:
        TextSession(changed_bundle(bundle, tmp_path / "bad.edgerun", change))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flipped_and_missing_bytes(bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    damaged = changed_bundle(bundle, tmp_path / "bad.edgerun", lambda _: None)
    program = damaged / "programs/text.pte"
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(content)
    with pytest.raises(BundleError, match="is damaged: sha256"):
        TextSession(damaged)
    program.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"has \d+ bytes, the manifest says \d+"):
        TextSession(damaged)


def test_a_link_that_leaves_the_folder(bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    linked = changed_bundle(bundle, tmp_path / "bad.edgerun", lambda _: None)
    (linked / "programs/text.pte").unlink()
    (linked / "programs/text.pte").symlink_to(bundle / "programs/text.pte")
    with pytest.raises(BundleError, match="a link that leaves the bundle folder"):
        TextSession(linked)


def test_a_program_whose_operator_nothing_defines(bundle: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The manifest is silent, so ExecuTorch finds it: error 0x14."""
    renamed = changed_bundle(bundle, tmp_path / "bad.edgerun", lambda _: None)
    content = (renamed / "programs/text.pte").read_bytes()
    replace_program(renamed, content.replace(b"edgerun::dhsa_attention", b"edgerun::dhsa_attentioX"))
    with pytest.raises(EdgerunError, match=r"dhsa_attentioX.*0x14: load the library that defines"):
        TextSession(renamed)


def test_what_is_no_bundle(tmp_path: pathlib.Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle folder"):
        TextSession(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        TextSession(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 1,')
    with pytest.raises(BundleError, match=r"is damaged .not JSON at line 1"):
        TextSession(tmp_path)
