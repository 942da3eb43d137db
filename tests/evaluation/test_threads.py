"""Needle Threading: the JSON parses, and following it by hand gives the answers."""

import hashlib
import json
import re

import pytest

from edgerun.evaluation import threads

_UUID = r"[0-9a-f*]{8}-[0-9a-f*-]{27}"
# Of three samples and a training document, as the shipped model was trained and measured on.
_DIGESTS = {
    "single": "c696141daab47150",
    "multiple": "2abf863cc842be6d",
    "conditional": "4358693a3c7f7921",
    "thread_forward": "49a433ac19f1cdd2",
    "thread_backward": "cff594d3bbd621ff",
    "thread_random": "061ff417b9985a94",
}


def read_object(prompt: str) -> dict[str, str | list[str]]:
    return json.loads(prompt[prompt.index("{") : prompt.index("}") + 1])


def asked_keys(prompt: str) -> list[str]:
    return re.findall(_UUID, prompt[prompt.index("}") :])


def every_path(pairs: dict[str, str | list[str]], key: str) -> list[list[str]]:
    """All ways from a key to a value that is no key."""
    if key not in pairs:
        return [[key]]
    values = pairs[key] if isinstance(pairs[key], list) else [pairs[key]]
    return [[key, *rest] for value in values for rest in every_path(pairs, value)]


@pytest.mark.parametrize("task", _DIGESTS)
def test_a_task_keeps_its_samples(task: str) -> None:
    samples = [threads.generate(task, 2048, 0, i) for i in range(3)]
    document = threads.generate_document(task, 4096, 5, 1, needles=2, questions=2, split="train")
    seen = repr([(s.prompt, s.answers, s.max_new_tokens) for s in samples] + [document])
    assert hashlib.sha256(seen.encode()).hexdigest()[:16] == _DIGESTS[task]


@pytest.mark.parametrize("task", threads.TASKS)
@pytest.mark.parametrize("length", [2048, 8192])
def test_prompt_and_answer_fit_the_length(task: str, length: int) -> None:
    sample = threads.generate(task, length, seed=0, index=0)
    assert length - 100 < len(sample.prompt.encode()) + sample.max_new_tokens + 1 <= length


@pytest.mark.parametrize("task", ["single", "multiple"])
def test_values_of_the_keys_asked_for(task: str) -> None:
    sample = threads.generate(task, 4096, 0, 0, needles=4)
    keys = re.findall(_UUID, sample.prompt[sample.prompt.index("}") :])
    assert len(keys) == (1 if task == "single" else 4)
    assert tuple(read_object(sample.prompt)[key] for key in keys) == sample.answers


def test_conditional_wants_every_value_whose_key_has_the_mark() -> None:
    sample = threads.generate("conditional", 4096, 0, 0, needles=3)
    wanted = tuple(value for key, value in read_object(sample.prompt).items() if "*" in key)
    assert wanted == sample.answers
    assert len(wanted) == 3


@pytest.mark.parametrize("task", ["thread_forward", "thread_backward", "thread_random"])
@pytest.mark.parametrize("hops", [1, 2, 5])
def test_following_the_thread_ends_at_the_answer(task: str, hops: int) -> None:
    sample = threads.generate(task, 4096, 0, 0, needles=hops)
    pairs = read_object(sample.prompt)
    current = re.findall(_UUID, sample.prompt[sample.prompt.index("}") :])[-1]
    order = []
    while current in pairs:
        order.append(list(pairs).index(current))
        current = pairs[current]
    assert (current,) == sample.answers
    assert len(order) == hops
    if task != "thread_random":
        assert order == sorted(order, reverse=task == "thread_backward")


@pytest.mark.parametrize("hops", [2, 3, 6])
def test_the_longest_of_all_branches_ends_at_the_answer(hops: int) -> None:
    for index in range(5):
        sample = threads.generate("thread_branched", 4096, 0, index, needles=hops)
        (key,) = asked_keys(sample.prompt)
        paths = sorted(every_path(read_object(sample.prompt), key), key=len)
        assert len(paths) == hops  # one more at every key but the last
        assert len(paths[-1]) == hops + 1 > len(paths[-2])
        assert sample.answers == (paths[-1][-1],)


def test_a_branch_stands_before_and_behind_the_thread() -> None:
    firsts = set()
    for index in range(10):
        sample = threads.generate("thread_branched", 4096, 0, index, needles=2)
        pairs = read_object(sample.prompt)
        values = pairs[asked_keys(sample.prompt)[0]]
        firsts.add(values[0] in pairs)
    assert firsts == {True, False}


def test_each_concurrent_thread_ends_at_its_answer() -> None:
    sample = threads.generate("threads_concurrent", 4096, 0, 0, needles=2)
    pairs = read_object(sample.prompt)
    ends = [pairs[pairs[key]] for key in asked_keys(sample.prompt)]
    assert tuple(ends) == sample.answers and len(set(ends)) == threads.CONCURRENT
    assert not set(ends) & set(pairs)


def test_score_of_concurrent_threads_counts_their_last_values() -> None:
    sample = threads.generate("threads_concurrent", 4096, 0, 0)
    assert threads.score(sample, " and ".join(sample.answers[1:])) == pytest.approx(2 / 3)


def test_threads_of_other_questions_do_not_meet() -> None:
    document = threads.generate_document("thread_random", 4096, 0, 0, needles=2, questions=3)
    assert len({question.answers for question in document.questions}) == 3


def test_score_of_a_thread_looks_for_the_last_value_only() -> None:
    sample = threads.generate("thread_forward", 2048, 0, 0, needles=2)
    assert len(sample.answers) == 1
    assert threads.score(sample, f"first -> {sample.answers[0]}") == 1.0
    assert threads.score(sample, "first -> second") == 0.0


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown threads task 'branched'"):
        threads.generate("branched", 2048, 0, 0)
    with pytest.raises(ValueError, match="needles is 0"):
        threads.generate("multiple", 2048, 0, 0, needles=0)
    with pytest.raises(ValueError, match="needles is 1; a branched thread"):
        threads.generate("thread_branched", 2048, 0, 0, needles=1)
    with pytest.raises(ValueError, match="too short"):
        threads.generate("multiple", 256, 0, 0, needles=4)
