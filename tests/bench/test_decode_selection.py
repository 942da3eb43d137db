"""What `--reselect` loses: the benchmark's settings go on from one prompt as models of their own would."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from bench.workloads import decode_selection
from edgerun.checkpoint import Checkpoint
from edgerun.evaluation import fidelity
from edgerun.models import causal_lm
from edgerun.recipe import DhsaOptions, Recipe
from edgerun.zoo import zoo_model_path

SIZES = ["--length", "640", "--budgets", "240", "--samples", "1", "--texts", "1", "--forced", "6", "--threads", "1"]


def test_every_setting_is_compared_with_selecting_for_every_token(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "results.json"
    decode_selection.main([*SIZES, "--tasks", "niah_single_1", "--output", str(output)])
    answers, forced = json.loads(output.read_text())["rows"]
    assert (answers["kind"], forced["kind"]) == ("answers", "forced")
    for row in (answers, forced):
        settings = [(one["every"], one["refine"]) for one in row["candidates"]]
        assert settings == [(1, 12), (4, 12), (16, 12), (1, 24), (1, 16), (1, 8), (1, 0)]
        assert set(row["candidates"][0]["difference"].values()) == {0.0}
    kls = [one["mean_kl_nats"] for one in forced["candidates"]]
    assert kls[0] > 0 and len(set(kls)) == len(kls)


def test_a_setting_equals_a_model_exported_with_it() -> None:
    arguments = ("zoo:text", 640, (240,), (1, 4), (12, 3), (), 1, 1, 6, 1)
    plan = decode_selection.Plan(*arguments)
    checkpoint = Checkpoint.open(zoo_model_path("text"))
    (text,) = decode_selection.held_out_texts(plan)
    model = decode_selection.Model(checkpoint, plan, 240)
    (found,) = decode_selection.follow(model, [text], plan.settings, plan.forced)
    for setting, logits in zip(plan.settings, found, strict=True):
        dhsa = DhsaOptions(budget=240, reselect=setting.every, refine=setting.refine)
        own = causal_lm.load(checkpoint, Recipe("dhsa", dhsa, 640))
        assert np.array_equal(logits, fidelity.eager_logits(own, text[:-6], text[-6:], 512))
