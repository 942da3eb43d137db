"""RULER's tasks: wording, answers that stand where the task says, lengths, determinism."""

import re
from collections import Counter

import pytest

from edgerun.evaluation import ruler
from edgerun.evaluation.sample import TRAINING_SPLIT, Sample


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize("length", [2048, 4096, 8192])
def test_prompt_and_answer_fill_the_length_and_never_pass_it(task: str, length: int) -> None:
    for index in range(5):
        sample = ruler.generate(task, length, seed=1, index=index)
        used = len(sample.prompt.encode()) + sample.max_new_tokens + 1
        assert used <= length
        assert used > length - 200


@pytest.mark.parametrize("task", ruler.TASKS)
def test_length_counts_in_the_callers_tokens(task: str) -> None:
    def count_words(text: str) -> int:
        return len(text.split())

    sample = ruler.generate(task, 1500, seed=1, index=0, count_tokens=count_words)
    assert 1200 < count_words(sample.prompt) + sample.max_new_tokens + 1 <= 1500


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_sample_is_decided_by_its_seed_and_index(task: str) -> None:
    sample = ruler.generate(task, 2048, seed=1, index=0)
    assert sample == ruler.generate(task, 2048, seed=1, index=0)
    assert sample.prompt != ruler.generate(task, 2048, seed=1, index=1).prompt
    assert sample.prompt != ruler.generate(task, 2048, seed=2, index=0).prompt


@pytest.mark.parametrize("task", ruler.TASKS)
def test_training_split_shares_no_answer_with_evaluation(task: str) -> None:
    training = {ruler.generate_document(task, 2048, 1, i, split=TRAINING_SPLIT).questions[0].answers for i in range(20)}
    evaluation = {ruler.generate(task, 2048, 1, i).answers for i in range(20)}
    assert len(training) == len(evaluation) == 20
    assert not training & evaluation


def test_niah_single_1_has_one_needle_in_noise() -> None:
    prompt = ruler.generate("niah_single_1", 2048, 0, 0).prompt
    lines = prompt.split("\n")
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    needles = [line for line in lines[1:-1] if line != noise]
    assert len(needles) == 1
    key, value = re.fullmatch(
        r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.", needles[0]
    ).groups()
    assert lines[-1] == (
        f"What is the special magic number for {key} mentioned in the provided text?"
        f" The special magic number for {key} mentioned in the provided text is"
    )
    assert ruler.generate("niah_single_1", 2048, 0, 0).answers == (value,)


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_multikey_haystack_is_needles_with_distinct_keys(task: str) -> None:
    sample = ruler.generate(task, 4096, 0, 0)
    pairs = dict(re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", sample.prompt))
    assert len(pairs) == sample.prompt.count("One of the special magic")
    asked = re.search(r"What is the special magic \w+ for (\S+) mentioned", sample.prompt).group(1)
    assert sample.answers == (pairs[asked],)


def test_multiquery_asks_for_four_keys_and_multivalue_for_four_values() -> None:
    query = ruler.generate("niah_multiquery", 2048, 0, 0)
    assert query.prompt.startswith("Some special magic numbers are hidden")
    assert len(set(query.answers)) == 4
    assert re.search(r"for \S+, \S+, \S+, and \S+ mentioned in the provided text are$", query.prompt)
    value = ruler.generate("niah_multivalue", 2048, 0, 0)
    key = re.search(r"for (\S+) mentioned in the provided text are$", value.prompt).group(1)
    assert sorted(re.findall(rf"for {key} is: (\d+)", value.prompt)) == sorted(value.answers)


def test_variable_tracking_resolves_by_hand() -> None:
    sample = ruler.generate("vt", 2048, 0, 0)
    body = sample.prompt[sample.prompt.rindex("Memorize and track") :]
    value = re.search(r"assigned the value (\d+) in the text", body).group(1)
    holders = re.findall(rf"VAR ([A-Z]{{5}}) = {value}\b", body)
    for target, source in re.findall(r"VAR ([A-Z]{5}) = VAR ([A-Z]{5})", body):
        if source in holders:
            holders.append(target)
    assert tuple(holders) == sample.answers
    assert len(holders) == 5


def test_common_words_are_the_ten_most_frequent() -> None:
    for length in (2048, 8192):
        sample = ruler.generate("cwe", length, 0, 0)
        listed = sample.prompt[sample.prompt.rindex("Memorize the ones") :].split("\n")[1]
        counts = Counter(re.findall(r"\d+\. (\S+)", listed)).most_common()
        assert {word for word, _ in counts[:10]} == set(sample.answers)
        assert counts[9][1] > counts[10][1]


def test_frequent_words_are_ranks_two_to_four() -> None:
    sample = ruler.generate("fwe", 2048, 0, 0)
    coded = sample.prompt[sample.prompt.index("coded words. ") : sample.prompt.index("\nQuestion")].split()[2:]
    counts = Counter(coded).most_common()
    assert counts[0][0] == "..."
    assert tuple(word for word, _ in counts[1:4]) == sample.answers
    assert counts[3][1] > counts[4][1]


def test_score_is_the_fraction_of_answers_in_the_output() -> None:
    sample = Sample("cwe", "", ("tiger", "maple", "stone", "river"), 10, 100, 0)
    assert ruler.score(sample, " 1. Tiger 2. maple 3. sand") == 0.5


def test_unknown_task_and_short_length_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown RULER task 'qa_1'"):
        ruler.generate("qa_1", 2048, 0, 0)
    with pytest.raises(ValueError, match="length of 100 tokens is too short"):
        ruler.generate("cwe", 100, 0, 0)
