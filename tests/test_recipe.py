"""A recipe's identity, what it holds for single layers, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest

from edgerun.errors import ExportError
from edgerun.recipe import DhsaOptions, LayerChoice, Recipe

CHECKPOINT = "0" * 64
CHOICES = (LayerChoice(512), LayerChoice(), LayerChoice(256, "block-topk", "fixed"))


@pytest.mark.parametrize(
    ("recipe", "build"),
    [
        (Recipe(), "f68788cebdffc547bf5ed83739a64adb07e1eda8d2ecbc062e1040b95647dbba"),
        (
            Recipe(attention="dense", max_context=4096),
            "52c47b2fc7a944d5353e7ab87a47ccb961d6857a743a0edff14398b02fd9a3f8",
        ),
        (
            Recipe(dhsa=DhsaOptions(budget=512, selector="window-sink"), quantize="int8"),
            "8803f8812edaf179d933bf7ff170fdf78cdae862f894d5902da0f6abd5a8396f",
        ),
    ],
)
def test_builds_whose_layers_are_alike_keep_the_identity_they_always_had(recipe: Recipe, build: str) -> None:
    assert recipe.hash(CHECKPOINT) == build
    assert "layers" not in recipe.to_json()["dhsa"]


def test_choices_for_layers_survive_json_and_change_the_identity() -> None:
    recipe = Recipe(dhsa=DhsaOptions().with_layers(CHOICES))
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    swapped = Recipe(dhsa=DhsaOptions().with_layers(CHOICES[::-1]))
    assert len({one.hash(CHECKPOINT) for one in (recipe, swapped, Recipe(dhsa=DhsaOptions(budget=512)))}) == 3


def test_a_layer_does_what_is_chosen_for_it() -> None:
    dhsa = DhsaOptions(tile=16, dense_layers=2).with_layers(CHOICES)
    assert dhsa.of_layer(0) == DhsaOptions(budget=512, tile=16)
    assert dhsa.of_layer(1) is None
    assert dhsa.of_layer(2) == DhsaOptions(budget=256, tile=16, selector="block-topk", chunking="fixed")
    assert (dhsa.budget, dhsa.budgets()) == (512, (256, 512))


@pytest.mark.parametrize("budget", [-1, 155])
def test_a_layers_budget_below_the_minimum_is_refused(budget: int) -> None:
    with pytest.raises(ExportError, match=f"budget is {budget} tokens, below its minimum of 156"):
        DhsaOptions().with_layers((LayerChoice(512), LayerChoice(budget)))


def test_all_layers_dense_is_another_recipe() -> None:
    with pytest.raises(ExportError, match="--attention dense"):
        DhsaOptions().with_layers((LayerChoice(), LayerChoice()))


@pytest.mark.parametrize("changes", [{"budget": 1024}, {"dense_layers": 1}])
def test_a_choice_that_the_layers_contradict_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ExportError, match="every layer has a choice of its own"):
        dataclasses.replace(DhsaOptions().with_layers(CHOICES), **changes)
