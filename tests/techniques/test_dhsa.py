"""Which layer of a decoder attends how."""

from __future__ import annotations

import pytest

from edgerun.errors import ExportError
from edgerun.ops.dhsa_attention_types import Chunking, Pooling, Selector
from edgerun.recipe import DhsaOptions, LayerChoice
from edgerun.techniques.dhsa import LayerAttention, layer_options

FULL = LayerAttention(scale=0.125, softcap=50.0)
WINDOWED = LayerAttention(scale=0.125, softcap=50.0, window=512)


def test_the_first_sparse_layer_finds_the_boundaries() -> None:
    options = layer_options(DhsaOptions(dense_layers=2), [FULL, WINDOWED, WINDOWED, FULL, FULL])
    assert [layer.kind for layer in options] == ["dense", "window", "window", "dhsa", "dhsa"]
    assert [layer.finds_boundaries for layer in options] == [False, False, False, True, False]
    assert [layer.budget for layer in options] == [0, 0, 0, 2048, 2048]


def test_dense_recipe_leaves_every_layer_as_the_model_has_it() -> None:
    options = layer_options(None, [FULL, WINDOWED])
    assert [layer.kind for layer in options] == ["dense", "window"]
    assert not any(layer.finds_boundaries or layer.keeps_summaries for layer in options)


def test_scale_softcap_and_window_reach_the_op() -> None:
    sparse, windowed = layer_options(DhsaOptions(), [FULL, WINDOWED])
    assert (sparse.scale, sparse.softcap, sparse.window) == (0.125, 50.0, 0)
    assert (windowed.scale, windowed.softcap, windowed.window) == (0.125, 50.0, 512)


def test_layers_may_differ_and_each_way_of_chunking_has_its_finder() -> None:
    choices = (
        LayerChoice(256, "window-sink"),
        LayerChoice(),
        LayerChoice(512),
        LayerChoice(1024, "block-topk"),
        LayerChoice(512),
    )
    options = layer_options(DhsaOptions().with_layers(choices), [FULL, FULL, FULL, FULL, WINDOWED])
    assert [layer.kind for layer in options] == ["dhsa", "dense", "dhsa", "dhsa", "window"]
    assert [layer.budget for layer in options] == [256, 0, 512, 1024, 0]
    assert [layer.finds_boundaries for layer in options] == [True, False, True, False, False]
    assert options[0].chunking == options[3].chunking == Chunking.FIXED != options[2].chunking
    assert options[3].pooling == Pooling.MEAN and options[0].selector == Selector.RECENT


def test_choices_for_another_model_are_refused() -> None:
    dhsa = DhsaOptions().with_layers((LayerChoice(512),))
    with pytest.raises(ExportError, match="choices for 1 layers, the model has 2"):
        layer_options(dhsa, [FULL, FULL])
