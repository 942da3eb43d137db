"""Needle Threading: the JSON parses, and following it by hand gives the answers."""

import json
import re

import pytest

from edgerun.evaluation import threads

_UUID = r"[0-9a-f*]{8}-[0-9a-f*-]{27}"


def read_object(prompt: str) -> dict[str, str]:
    return json.loads(prompt[prompt.index("{") : prompt.index("}") + 1])


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
    with pytest.raises(ValueError, match="too short"):
        threads.generate("multiple", 256, 0, 0, needles=4)
