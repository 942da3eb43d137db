"""TextEncoder: a prompt → hidden states of its tokens, by the encoder of T5 v1.1, any size.

transformers computes it as a whole, for training and as the truth. For a device the same weights are cut into pieces
that can be programs of their own: the embedding with the position bias that every layer shares, each layer, the last
norm. Their tensors can be read piece by piece. A prompt is never padded, so nothing needs a mask.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from edgerun.errors import CheckpointError, EdgerunError
from edgerun.models.rms_norm import RmsNorm
from edgerun.models.token_table import TokenTable
from edgerun.ops import embedding_lookup  # noqa: F401  (registers the op)
from edgerun.tensor_files import TensorFiles, read_json

MAX_TOKENS = 300  # of a prompt, its end mark included; what Open-Sora v1.2 was trained with
_TABLE, _OTHER_TABLE = "shared.weight", "encoder.embed_tokens.weight"  # one tensor, by its two names
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # tokens 0, 1 and 2 in T5


def clean_caption(prompt: str) -> str:
    """`prompt` in lower case without outer blanks, the form of the captions that Open-Sora was trained with."""
    return prompt.strip().lower()


def build_word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """A word-level tokenizer that T5 can use: <pad> 0, </s> 1, <unk> 2, then `words` in their order, each once.

    Text is lower-cased and split at blanks and around punctuation marks; </s> is appended.
    Raises EdgerunError for a word that this splitting would never give.
    """
    splitting = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    for word in words:
        if [part for part, _ in splitting.pre_tokenize_str(word.lower())] != [word.lower()]:
            raise EdgerunError(f"{word!r} is not one word: leave blanks out and give punctuation marks one by one")
    vocabulary = list(dict.fromkeys([PAD, END, UNKNOWN, *(word.lower() for word in words)]))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitting
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return tokenizer


class PromptTokenizer:
    """A tokenizer.json with a limit on the length of a prompt."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int = MAX_TOKENS) -> None:
        """max_tokens: of a prompt, its end mark included."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    @staticmethod
    def load(folder: pathlib.Path, max_tokens: int = MAX_TOKENS) -> PromptTokenizer:
        """The tokenizer.json of `folder`. Raises CheckpointError when it is missing or damaged."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json: save it with AutoTokenizer(...).save_pretrained(folder)"
            )
        try:
            return PromptTokenizer(Tokenizer.from_file(str(path)), max_tokens)
        except Exception as error:  # tokenizers raises nothing narrower
            raise CheckpointError(f"{path} is not a tokenizer ({error}): fetch the checkpoint again") from None

    def encode(self, prompt: str) -> torch.Tensor:
        """`prompt` → int64 [1, n], n from 1 to max_tokens; the last token is the end mark.

        Raises EdgerunError for a prompt over the limit.
        """
        tokens = self.tokenizer.encode(clean_caption(prompt)).ids
        if len(tokens) > self.max_tokens:
            raise EdgerunError(
                f"the prompt has {len(tokens)} tokens, end mark included; the limit is {self.max_tokens}: shorten it"
            )
        return torch.tensor([tokens], dtype=torch.int64)

    def unknown_words(self, prompt: str) -> list[str]:
        """The parts of `prompt` that the vocabulary does not hold, each once, in their order."""
        cleaned = clean_caption(prompt)
        encoding = self.tokenizer.encode(cleaned, add_special_tokens=False)
        unknown = self.tokenizer.token_to_id(UNKNOWN)
        spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == unknown]
        return list(dict.fromkeys(cleaned[start:end] for start, end in spans))


class TextEncoder(nn.Module):
    """transformers' T5EncoderModel with the tokenizer of its checkpoint."""

    def __init__(self, model: Any, tokenizer: PromptTokenizer) -> None:
        """model: a T5EncoderModel with gated GELU, as in T5 v1.1. Raises CheckpointError for another kind of T5."""
        super().__init__()
        _check_version(model.config)
        self.model = model
        self.tokenizer = tokenizer

    @property
    def width(self) -> int:
        """Channels of a hidden state."""
        return int(self.model.config.d_model)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """tokens int64 [B, n] → hidden states [B, n, width]; mask int64 [B, n]: 1 for tokens, 0 for padding."""
        result: torch.Tensor = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        return result

    def encode(self, prompt: str) -> torch.Tensor:
        """`prompt` → hidden states of its own tokens [1, n, width]; an empty prompt has its end mark alone.

        Raises EdgerunError for a prompt over the token limit.
        """
        with torch.no_grad():
            return self(self.tokenizer.encode(prompt).to(self.model.device))  # type: ignore[no-any-return]


def load_text_encoder(
    folder: pathlib.Path, max_tokens: int = MAX_TOKENS, dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The T5 v1.1 encoder of a Hugging Face folder (config.json, weights, tokenizer.json), in eval mode.

    Raises CheckpointError when something is missing, damaged, or of another architecture.
    """
    from safetensors import SafetensorError
    from transformers import T5EncoderModel

    tokenizer = PromptTokenizer.load(folder, max_tokens)
    try:
        model, report = T5EncoderModel.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} does not hold a T5 encoder ({reason}): fetch the checkpoint again") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"tensor {missing[0]!r} is missing from {folder} ({len(missing)} in all): fetch the checkpoint again"
        )
    encoder = TextEncoder(model, tokenizer)
    return encoder.eval().requires_grad_(False)


def outline_text_encoder(folder: pathlib.Path) -> tuple[Any, TensorFiles]:
    """The encoder of a Hugging Face folder (config.json, safetensors) on the meta device, and where its tensors are.

    The table may be stored as shared.weight or as encoder.embed_tokens.weight; it is under the first name in what is
    returned. Raises CheckpointError when something is missing, damaged, or of another architecture.
    """
    from transformers import T5Config, T5EncoderModel

    values = read_json(folder / "config.json")
    kind = values.get("model_type")
    if kind != "t5":
        raise CheckpointError(f"the text encoder in {folder} is a {kind}; edgerun takes T5 v1.1")
    try:
        config = T5Config.from_dict(values)
        with torch.device("meta"):
            model = T5EncoderModel(config)
    except Exception as error:  # huggingface_hub's strict dataclasses raise kinds of their own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder / 'config.json'} does not describe a T5 encoder ({reason})") from None
    _check_version(config)
    weights = TensorFiles.open(folder)
    if all(name in weights.entries for name in (_TABLE, _OTHER_TABLE)) and not weights.same_bytes(_TABLE, _OTHER_TABLE):
        raise CheckpointError(
            f"{folder} holds {_TABLE} and {_OTHER_TABLE} with different values; T5 has one table: fetch it again"
        )
    if _TABLE not in weights.entries and _OTHER_TABLE in weights.entries:
        weights = TensorFiles(folder, {**weights.entries, _TABLE: weights.entries[_OTHER_TABLE]})
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    weights.check({name: shape for name, shape in shapes.items() if name != _OTHER_TABLE})
    return model.eval().requires_grad_(False), weights


def _check_version(config: Any) -> None:
    if config.model_type != "t5" or not config.is_gated_act or config.dense_act_fn != "gelu_new":
        raise CheckpointError(
            f"the text encoder is a {config.model_type} with {config.feed_forward_proj!r} layers; edgerun takes "
            "T5 v1.1, with 'gated-gelu'"
        )


@dataclasses.dataclass(frozen=True)
class EncoderBlock:
    """One part of the encoder that can be a program of its own.

    embedding: tokens int64 [1, n] → hidden [1, n, width], bias [heads, n, n]
    layer_<i>: hidden, bias → hidden
    norm: hidden → hidden states, what TextEncoder.encode gives
    """

    name: str
    module: nn.Module
    checkpoint_names: Mapping[str, str]  # a checkpoint's name for each tensor in module.state_dict()


def encoder_blocks(
    model: Any, max_tokens: int = MAX_TOKENS, weights: TensorFiles | None = None
) -> Iterator[EncoderBlock]:
    """The embedding, the layers in order and the last norm, for inference. Their matrices are shared with `model`.

    model: a T5EncoderModel. max_tokens: the longest prompt. weights: where the tensors of a model on the meta device
    come from; each is let go of after its block, so that one block is in memory at a time.
    Raises CheckpointError for a T5 that is not v1.1.
    """
    for block in _blocks(model, max_tokens):
        if weights is not None:
            tensors = {own: weights[name].float() for own, name in block.checkpoint_names.items()}
            block.module.load_state_dict(tensors, assign=True)
            del tensors
        yield block
        if weights is not None:
            block.module.to("meta")


def _blocks(model: Any, max_tokens: int) -> Iterator[EncoderBlock]:
    _check_version(model.config)
    attention, feed_forward = "layer.0", "layer.1"
    yield EncoderBlock(
        "embedding",
        Embedding(model, max_tokens).eval(),
        {
            "table.weight": _TABLE,
            "distance_bias.weight": f"encoder.block.0.{attention}.SelfAttention.relative_attention_bias.weight",
        },
    )
    names = {
        "attention_norm.weight": f"{attention}.layer_norm.weight",
        "query.weight": f"{attention}.SelfAttention.q.weight",
        "key.weight": f"{attention}.SelfAttention.k.weight",
        "value.weight": f"{attention}.SelfAttention.v.weight",
        "output.weight": f"{attention}.SelfAttention.o.weight",
        "feed_forward_norm.weight": f"{feed_forward}.layer_norm.weight",
        "gate.weight": f"{feed_forward}.DenseReluDense.wi_0.weight",
        "up.weight": f"{feed_forward}.DenseReluDense.wi_1.weight",
        "down.weight": f"{feed_forward}.DenseReluDense.wo.weight",
    }
    for i, block in enumerate(model.encoder.block):
        full_names = {own: f"encoder.block.{i}.{name}" for own, name in names.items()}
        yield EncoderBlock(f"layer_{i}", EncoderLayer(block).eval(), full_names)
    norm = _norm(model.encoder.final_layer_norm).eval()
    yield EncoderBlock("norm", norm, {"weight": "encoder.final_layer_norm.weight"})


class Embedding(nn.Module):
    """Rows of the tokens, and what attention adds for the distance between two; layer 0 holds it for all layers."""

    buckets: torch.Tensor

    def __init__(self, model: Any, max_tokens: int) -> None:
        """model: a T5EncoderModel."""
        super().__init__()
        attention = model.encoder.block[0].layer[0].SelfAttention
        self.table = model.shared
        self.distance_bias = attention.relative_attention_bias
        self.max_tokens = max_tokens
        distances = torch.arange(1 - max_tokens, max_tokens, device="cpu")
        counts = (attention.relative_attention_num_buckets, attention.relative_attention_max_distance)
        self.register_buffer("buckets", relative_position_buckets(distances, *counts), persistent=False)

    def quantize(self) -> None:
        """Keep the table in int8, a scale a row; the float one goes to the meta device."""
        from edgerun.techniques.weight_quantization import quantize_rows

        table: nn.Module = self.table
        self.table = TokenTable(*quantize_rows(self.table.weight.detach()), torch.float32, 1.0)
        table.to("meta")

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens int64 [1, n], n ≤ max_tokens → hidden [1, n, width], bias [heads, n, n] of (query, key)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        distances = places.unsqueeze(0) - places.unsqueeze(1)  # of key from query
        bias = self.distance_bias(self.buckets[distances + (self.max_tokens - 1)])  # [n, n, heads]
        return self.table(tokens), bias.permute(2, 0, 1).contiguous()


def relative_position_buckets(distances: torch.Tensor, buckets: int, max_distance: int) -> torch.Tensor:
    """The bucket of each signed distance of a key from its query, int64 (arXiv 1910.10683 section 2.1).

    Half of the buckets are for keys that come later. Of each half, one half holds one distance a bucket, the other
    grows with the logarithm of the distance; what is at max_distance or beyond shares the last.
    """
    half = buckets // 2
    exact = half // 2
    size = distances.abs()
    # In this order of float32 operations: the sums that end on a whole number decide a bucket by their last bit.
    growth = torch.log(size.clamp(min=exact).float() / exact) / math.log(max_distance / exact) * (half - exact)
    grown = (exact + growth.long()).clamp(max=half - 1)
    return torch.where(size < exact, size, grown) + half * (distances > 0)


class EncoderLayer(nn.Module):
    """Self-attention with logits that are not scaled, and a feed-forward part gated by GELU; each after its norm."""

    def __init__(self, block: Any) -> None:
        """block: a T5Block of an encoder."""
        super().__init__()
        attention, feed_forward = block.layer[0].SelfAttention, block.layer[1].DenseReluDense
        self.attention_norm = _norm(block.layer[0].layer_norm)
        self.query, self.key, self.value, self.output = attention.q, attention.k, attention.v, attention.o
        self.heads = int(attention.n_heads)
        self.feed_forward_norm = _norm(block.layer[1].layer_norm)
        self.gate, self.up, self.down = feed_forward.wi_0, feed_forward.wi_1, feed_forward.wo

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """hidden [1, n, width], bias [heads, n, n] → [1, n, width]."""
        normed = self.attention_norm(hidden)
        query, key, value = (self._heads(linear(normed)) for linear in (self.query, self.key, self.value))
        weights = (torch.bmm(query, key.transpose(1, 2)) + bias).softmax(-1)  # [heads, n, n]
        attended = torch.bmm(weights, value).transpose(0, 1)  # [n, heads, head width]
        hidden = hidden + self.output(attended.reshape(1, hidden.shape[1], -1))
        normed = self.feed_forward_norm(hidden)
        gated = F.gelu(self.gate(normed), approximate="tanh") * self.up(normed)
        result: torch.Tensor = hidden + self.down(gated)
        return result

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, n, heads × head width] → [heads, n, head width]."""
        return x.view(x.shape[1], self.heads, -1).transpose(0, 1)


def _norm(source: Any) -> RmsNorm:
    """source: a T5LayerNorm."""
    return RmsNorm(source.weight.detach(), float(source.variance_epsilon))
