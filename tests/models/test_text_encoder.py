"""TextEncoder: prompts to tokens, tokens to hidden states, and the encoder's blocks against transformers' whole."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from edgerun import compare
from edgerun._library import load_op_library
from edgerun.errors import CheckpointError, EdgerunError
from edgerun.export.lower.executorch import lower
from edgerun.models.text_encoder import (
    EncoderBlock,
    PromptTokenizer,
    TextEncoder,
    build_word_tokenizer,
    encoder_blocks,
    load_text_encoder,
    outline_text_encoder,
    relative_position_buckets,
)
from tests.export.programs import portable_calls

WORDS = ("a", "red", "Circle", "moves", "left", ",", "red")
LONGEST = 40  # tokens
FILE = "model.safetensors"


def config(feed_forward: str = "gated-gelu") -> T5Config:
    return T5Config(
        vocab_size=24,
        d_model=32,
        d_kv=12,  # heads × d_kv is not d_model, as in no official size, so that the two cannot be mixed up
        d_ff=40,
        num_layers=3,
        num_heads=4,
        feed_forward_proj=feed_forward,
        tie_word_embeddings=False,
    )


def random_model() -> T5EncoderModel:
    """Norms that are not neutral and biases of distance that matter."""
    torch.manual_seed(0)
    model = T5EncoderModel(config()).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            parameter.copy_(torch.randn(parameter.shape))
        elif "norm" in name:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def tokens(count: int) -> torch.Tensor:
    return torch.randint(0, 24, (1, count), generator=torch.Generator().manual_seed(count))


# Prompts to tokens.


def test_a_word_tokenizer_numbers_words_as_given() -> None:
    tokenizer = build_word_tokenizer(WORDS)
    vocabulary = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "moves", "left", ","]
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(vocabulary)}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle moves left", [3, 4, 5, 6, 7, 1]),
        ("  A RED\tcircle,moves \n LEFT ", [3, 4, 5, 8, 6, 7, 1]),
        ("a blue circle.", [3, 2, 5, 2, 1]),
        ("", [1]),
        ("   ", [1]),
    ],
)
def test_a_prompt_becomes_tokens(prompt: str, expected: list[int]) -> None:
    assert PromptTokenizer(build_word_tokenizer(WORDS)).encode(prompt).tolist() == [expected]


def test_unknown_words_are_named_once() -> None:
    tokenizer = PromptTokenizer(build_word_tokenizer(WORDS))
    assert tokenizer.unknown_words(" A Blue circle, not a blue-ish square") == ["blue", "not", "-", "ish", "square"]
    assert tokenizer.unknown_words("a red circle") == [] == tokenizer.unknown_words("")


@pytest.mark.parametrize("word", ["top-left", "two words", "", " "])
def test_a_word_that_no_prompt_can_hold(word: str) -> None:
    with pytest.raises(EdgerunError, match="is not one word"):
        build_word_tokenizer(["a", word])


def test_a_prompt_over_the_limit() -> None:
    tokenizer = PromptTokenizer(build_word_tokenizer(WORDS), max_tokens=4)
    assert tokenizer.encode("a red circle").shape == (1, 4)
    with pytest.raises(EdgerunError, match=r"5 tokens.*limit is 4.*shorten") as error:
        tokenizer.encode("a red circle moves")
    assert "\n" not in str(error.value)


def test_padding_and_truncation_of_the_file_are_not_taken() -> None:
    tokenizer = build_word_tokenizer(WORDS)
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(2)
    assert PromptTokenizer(tokenizer).encode("a red circle").tolist() == [[3, 4, 5, 1]]


# Loading.


def save(folder: pathlib.Path, model: torch.nn.Module, tokenizer: Tokenizer | None = None) -> pathlib.Path:
    model.save_pretrained(folder)
    (tokenizer or build_word_tokenizer(WORDS)).save(str(folder / "tokenizer.json"))
    return folder


def test_a_folder_encodes_as_its_model(tmp_path: pathlib.Path) -> None:
    model = random_model()
    encoder = load_text_encoder(save(tmp_path, model))
    hidden = encoder.encode("A red circle")
    assert hidden.shape == (1, 4, 32) == (1, 4, encoder.width)
    expected = model(torch.tensor([[3, 4, 5, 1]])).last_hidden_state
    assert compare.relative_l2(hidden, expected) <= compare.tolerance("op_against_op_fp32")
    assert encoder.encode("").shape == (1, 1, 32)


def test_the_encoder_of_a_whole_t5_is_taken(tmp_path: pathlib.Path) -> None:
    whole = T5ForConditionalGeneration(config()).eval()
    encoder = load_text_encoder(save(tmp_path, whole))
    expected = whole.get_encoder()(torch.tensor([[3, 1]])).last_hidden_state.detach()
    assert compare.relative_l2(encoder.encode("a"), expected) <= compare.tolerance("op_against_op_fp32")


def test_padding_does_not_change_a_prompt() -> None:
    encoder = TextEncoder(random_model(), PromptTokenizer(build_word_tokenizer(WORDS)))
    alone = encoder.encode("a red circle")
    padded = torch.tensor([[3, 4, 5, 1, 0, 0, 0], [3, 4, 5, 6, 7, 8, 1]])
    batch = encoder(padded, (padded != 0).long())
    assert compare.relative_l2(batch[:1, :4], alone) <= compare.tolerance("op_against_op_fp32")


def test_folders_that_hold_no_t5_encoder(tmp_path: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_text_encoder(tmp_path)
    save(tmp_path, random_model())
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(CheckpointError, match="fetch the checkpoint again"):
        load_text_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="fetch the checkpoint again"):
        load_text_encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        load_text_encoder(tmp_path)


def test_a_tensor_that_is_missing(tmp_path: pathlib.Path) -> None:
    save(tmp_path, random_model())
    deeper = config()
    deeper.num_layers = 4
    deeper.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'encoder\.block\.3.*is missing"):
        load_text_encoder(tmp_path)


def stored(folder: pathlib.Path, dtype: torch.dtype, drop: str = "", **more: torch.Tensor) -> pathlib.Path:
    """The random model as a file of exactly the tensors of its state, but `drop` and with `more`."""
    model = random_model()
    model.config.save_pretrained(folder)
    tensors = {name: tensor.to(dtype).clone() for name, tensor in model.state_dict().items() if name != drop}
    save_file(tensors | {name.replace("_weight", ".weight"): tensor for name, tensor in more.items()}, folder / FILE)
    return folder


def filled(folder: pathlib.Path) -> torch.Tensor:
    """What the blocks of a folder make of a prompt, each filled when it is its turn."""
    model, weights = outline_text_encoder(folder)
    hidden, bias = tokens(9), None
    for block in encoder_blocks(model, LONGEST, weights):
        tensors = block.module.state_dict().values()
        assert tensors and all(tensor.dtype == torch.float32 and not tensor.is_meta for tensor in tensors)
        if block.name == "embedding":
            hidden, bias = block.module(hidden)
        else:
            hidden = block.module(hidden) if block.name == "norm" else block.module(hidden, bias)
        kept = [name for name, tensor in model.state_dict().items() if not tensor.is_meta]
        assert len(kept) <= 9  # of this block alone
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    return hidden


@pytest.mark.parametrize("drop", ["", "shared.weight", "encoder.embed_tokens.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_filled_from_a_file_one_by_one(tmp_path: pathlib.Path, dtype: torch.dtype, drop: str) -> None:
    model = random_model().to(dtype).float()
    expected = run(list(encoder_blocks(model, LONGEST)), tokens(9))
    assert torch.equal(filled(stored(tmp_path, dtype, drop)), expected)


def test_blocks_are_filled_from_shards(tmp_path: pathlib.Path) -> None:
    random_model().save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(filled(tmp_path), run(list(encoder_blocks(random_model(), LONGEST)), tokens(9)))


def test_the_tensors_of_a_whole_t5_are_taken(tmp_path: pathlib.Path) -> None:
    whole = T5ForConditionalGeneration(config()).eval()
    whole.save_pretrained(tmp_path)
    expected = whole.get_encoder()(tokens(9)).last_hidden_state.detach()
    assert compare.relative_l2(filled(tmp_path), expected) <= compare.tolerance("op_against_op_fp32")


def change_config(folder: pathlib.Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: stored(folder, torch.float32, "encoder.final_layer_norm.weight"), "is missing"),
        (lambda folder: stored(folder, torch.float32, shared_weight=torch.zeros(24, 32)), "different values"),
        (lambda folder: change_config(folder, d_model=40), r"has shape \[.*config.json says"),
        (lambda folder: change_config(folder, model_type="umt5"), "is a umt5; edgerun takes T5 v1.1"),
        (lambda folder: change_config(folder, is_gated_act=False), "edgerun takes T5 v1.1"),
        (lambda folder: change_config(folder, d_ff="wide"), "does not describe a T5 encoder"),
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-4]), "is truncated"),
        (lambda folder: (folder / FILE).rename(folder / "pytorch_model.bin"), "reads safetensors only"),
    ],
)
def test_folders_whose_blocks_cannot_be_filled(
    tmp_path: pathlib.Path, harm: Callable[[pathlib.Path], object], said: str
) -> None:
    stored(tmp_path, torch.float32)
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=said) as error:
        outline_text_encoder(tmp_path)
    assert "\n" not in str(error.value)


def test_another_version_of_t5_is_refused() -> None:
    model = T5EncoderModel(config("relu"))
    with pytest.raises(CheckpointError, match=r"T5 v1\.1"):
        TextEncoder(model, PromptTokenizer(build_word_tokenizer(WORDS)))
    with pytest.raises(CheckpointError, match=r"T5 v1\.1"):
        next(encoder_blocks(model))


# The encoder as blocks.


@pytest.mark.parametrize(
    ("distance", "bucket"),
    [(0, 0), (-1, 1), (-7, 7), (-8, 8), (-11, 8), (-12, 9), (-127, 15), (-1000, 15), (1, 17), (8, 24), (300, 31)],
)
def test_buckets_of_distances(distance: int, bucket: int) -> None:
    assert relative_position_buckets(torch.tensor([distance]), 32, 128).tolist() == [bucket]


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (16, 64), (8, 20)])
def test_buckets_are_those_of_transformers(buckets: int, furthest: int) -> None:
    distances = torch.arange(-400, 401)
    expected = T5Attention._relative_position_bucket(distances, True, buckets, furthest)
    assert torch.equal(relative_position_buckets(distances, buckets, furthest), expected)


def run(blocks: list[EncoderBlock], prompt: torch.Tensor) -> torch.Tensor:
    hidden, bias = blocks[0].module(prompt)
    for block in blocks[1:-1]:
        hidden = block.module(hidden, bias)
    return blocks[-1].module(hidden)


@pytest.mark.parametrize("count", [1, 2, 17, LONGEST])
def test_the_chain_of_blocks_is_the_encoder(count: int) -> None:
    model = random_model()
    blocks = list(encoder_blocks(model, LONGEST))
    assert [block.name for block in blocks] == ["embedding", "layer_0", "layer_1", "layer_2", "norm"]
    expected = model(tokens(count)).last_hidden_state
    assert compare.relative_l2(run(blocks, tokens(count)), expected) <= compare.tolerance("op_against_op_fp32")


def test_blocks_are_filled_by_the_names_of_a_checkpoint() -> None:
    model = random_model()
    state = model.state_dict()
    with torch.device("meta"):
        outline = T5EncoderModel(config())
    blocks = list(encoder_blocks(outline, LONGEST))
    for block in blocks:
        tensors = {own: state[name] for own, name in block.checkpoint_names.items()}
        block.module.load_state_dict(tensors, assign=True)
    used = {name for block in blocks for name in block.checkpoint_names.values()}
    assert set(state) - used == {"encoder.embed_tokens.weight"}  # the table's other name
    assert torch.equal(run(blocks, tokens(9)), run(list(encoder_blocks(model, LONGEST)), tokens(9)))


@pytest.mark.parametrize("index", [0, 1, -1])
def test_a_block_runs_as_a_program_of_any_length(index: int, tmp_path: pathlib.Path) -> None:
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    load_op_library()
    blocks = list(encoder_blocks(random_model(), LONGEST))
    block = blocks[index]

    def inputs(count: int) -> tuple[torch.Tensor, ...]:
        hidden, bias = blocks[0].module(tokens(count))
        return {"embedding": (tokens(count),), "norm": (hidden,)}.get(block.name, (hidden, bias))

    count = torch.export.Dim("tokens", min=1, max=LONGEST)
    shapes = ({1: count}, {1: count, 2: count})[: len(inputs(8))]
    program = torch.export.export(block.module, inputs(8), dynamic_shapes=shapes)
    ranks = {len(node.meta["val"].shape) for node in program.graph.nodes if hasattr(node.meta.get("val"), "shape")}
    assert max(ranks) <= 4
    path = tmp_path / "block.pte"
    lower(program, path, {})
    loaded = _load_for_executorch(str(path))
    for length in (8, 1, LONGEST, 2, 17):
        measured = loaded.run_method("forward", inputs(length))
        expected = block.module(*inputs(length))
        for a, b in zip(measured, expected if isinstance(expected, tuple) else (expected,), strict=True):
            assert compare.relative_l2(a, b) <= compare.tolerance("op_against_op_fp32")
    if block.name == "layer_0":
        assert portable_calls(path) == []
