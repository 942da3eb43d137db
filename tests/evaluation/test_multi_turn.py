"""Two questions about one document: other needles, far apart, within the length; and the state that is kept."""

from __future__ import annotations

import dataclasses
import re

import pytest

from edgerun.commands.eval import make_jobs
from edgerun.commands.eval_contenders import eager_contender
from edgerun.errors import EdgerunError
from edgerun.evaluation import fidelity, multi_turn
from edgerun.evaluation.answerers import EagerAnswerer
from edgerun.evaluation.answers import Answer, Contender, Job, answer_all
from edgerun.evaluation.sample import FollowUp, Sample
from tests.shared_bundle import RECIPE, SharedBundle, shared_bundle

NEEDLES = tuple(task for task in multi_turn.TASKS if task != "vt")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SharedBundle:
    return shared_bundle(tmp_path_factory, "tiny", RECIPE)


@pytest.mark.parametrize("task", multi_turn.TASKS)
@pytest.mark.parametrize("length", [2048, 8192])
def test_both_turns_fill_the_length_and_never_pass_it(task: str, length: int) -> None:
    for index in range(5):
        sample = multi_turn.generate(task, length, 0, index)
        second = sample.follow_up
        assert second is not None
        used = len((sample.prompt + second.text).encode()) + sample.max_new_tokens + second.max_new_tokens + 1
        assert length - 200 < used <= length


@pytest.mark.parametrize("task", NEEDLES)
def test_each_question_has_its_own_needle_a_quarter_of_the_document_apart(task: str) -> None:
    for index in range(10):
        document = multi_turn.generate_document(task, 4096, 0, index)
        places = []
        for question in document.questions:
            key = re.search(r"for (\S+) mentioned in the provided text\?", question.text)
            assert key is not None
            (needle,) = re.findall(rf"special magic \w+ for {key[1]} is: (\S+)\.", document.text)
            assert (needle,) == question.answers
            places.append(document.text.index(needle))
        assert abs(places[0] - places[1]) > 0.24 * len(document.text)


def test_two_needles_stand_in_noise_alone() -> None:
    text = multi_turn.generate_document("niah_two_needles", 2048, 0, 0).text
    assert text.count("One of the special magic numbers") == 2
    assert text.count("The grass is green.") > 5


def test_the_second_chain_is_another_one() -> None:
    document = multi_turn.generate_document("vt", 4096, 0, 0)
    body = document.text[document.text.rindex("Memorize and track") :]
    for question in document.questions:
        value = re.search(r"assigned the value (\d+)", question.text)
        assert value is not None
        held = re.findall(rf"VAR ([A-Z]{{5}}) = {value[1]}\b", body)
        for target, source in re.findall(r"VAR ([A-Z]{5}) = VAR ([A-Z]{5})", body):
            held += [target] if source in held else []
        assert tuple(held) == question.answers
    assert not set(document.questions[0].answers) & set(document.questions[1].answers)


def test_unknown_task_and_short_length_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown multi-turn task 'cwe'"):
        multi_turn.generate("cwe", 2048, 0, 0)
    with pytest.raises(EdgerunError, match="too short"):
        Job("multi-turn", "vt", 512, 0, 0).sample()


# ---- what the answerers do with two turns, on samples that fit a tiny model's context

PROMPT = "".join(f"{7 * i % 97} " for i in range(80))[:120]
SECOND = "".join(f"{5 * i % 89}, " for i in range(80))[:100]  # more than a slice, and not from a multiple of the tile
JOB = Job("multi-turn", "vt", 256, 0, 0)
SAMPLE = Sample("vt", PROMPT, ("1",), 9, 256, 0, FollowUp(SECOND, ("2",), 9))


@pytest.fixture
def short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "sample", lambda job, count_tokens: SAMPLE)


def answers_of(contender: Contender) -> Answer:
    return answer_all([contender], [JOB], processes=1)[contender.build, JOB]


@pytest.mark.usefixtures("short_sample")
def test_eager_and_bundle_give_the_same_two_answers(tiny: SharedBundle) -> None:
    eager = answers_of(eager_contender("eager", tiny.checkpoint, RECIPE))
    bundle = answers_of(Contender("bundle", tiny.path, None, "bundle"))
    assert eager.first_turn == bundle.first_turn and eager.first_turn is not None
    assert eager.output == bundle.output != eager.first_turn.output
    assert eager.density == bundle.density and bundle.density is not None and bundle.density < 1


@pytest.mark.usefixtures("short_sample")
def test_the_second_answer_follows_document_question_and_first_answer(tiny: SharedBundle) -> None:
    """Dense attention does not depend on how tokens arrive: one prompt of all that came gives the same answer."""
    contender = eager_contender("dense", tiny.checkpoint, dataclasses.replace(RECIPE, attention="dense"))
    answerer = EagerAnswerer(contender)
    first = answerer.answer(JOB).first_turn
    assert first is not None
    tokenizer, model = answerer._tokenizer, answerer.model
    ids = tokenizer.encode(PROMPT).ids
    run = fidelity.greedy(model, ids, max_new_tokens=9, ends=answerer._ends, prefill_slice=64)
    assert SAMPLE.follow_up is not None
    behind = tokenizer.encode(SAMPLE.follow_up.text, add_special_tokens=False).ids
    whole = fidelity.greedy(
        model, [*ids, *run.tokens, *behind], max_new_tokens=9, ends=answerer._ends, prefill_slice=64
    )
    assert tokenizer.decode(list(run.tokens)) == first.output
    assert tokenizer.decode(list(whole.tokens)) == answerer.answer(JOB).output


@pytest.mark.usefixtures("short_sample")
def test_right_counts_the_second_turn_and_the_record_keeps_the_first(
    tiny: SharedBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    contender = eager_contender("eager", tiny.checkpoint, RECIPE)
    before = answers_of(contender)
    assert before.first_turn is not None and SAMPLE.follow_up is not None
    second = dataclasses.replace(SAMPLE.follow_up, answers=(before.output[:4],))
    sample = dataclasses.replace(SAMPLE, answers=("never there",), follow_up=second)
    monkeypatch.setattr(Job, "sample", lambda job, count_tokens: sample)
    found = answers_of(contender)
    assert (found.score, found.first_turn.score if found.first_turn else None) == (1.0, 0.0)
    assert Answer.from_json(found.to_json()) == found


@pytest.mark.usefixtures("short_sample")
def test_a_context_without_room_for_the_second_turn_is_refused(
    tiny: SharedBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SAMPLE.follow_up is not None
    longer = dataclasses.replace(SAMPLE.follow_up, max_new_tokens=100)
    monkeypatch.setattr(Job, "sample", lambda job, count_tokens: dataclasses.replace(SAMPLE, follow_up=longer))
    with pytest.raises(EdgerunError, match="the context holds 256"):
        answers_of(eager_contender("eager", tiny.checkpoint, RECIPE))


def test_the_suite_has_its_tasks() -> None:
    assert {job.task for job in make_jobs("multi-turn", None, (2048,), 1, 0)} == set(multi_turn.TASKS)
