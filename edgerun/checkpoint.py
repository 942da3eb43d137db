"""Checkpoint: a Hugging Face folder as configuration, memory-mapped tensors and tokenizer files.

Opening reads the configuration and the safetensors headers, never the weights. What edgerun cannot export is refused
here, in one line, before any work is done: a missing or damaged file, a model that is not a decoder-only text model, a
rotary embedding that nobody knows, or attention that does not go through transformers' AttentionInterface.
"""

from __future__ import annotations

import hashlib
import mmap
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from edgerun.errors import CheckpointError
from edgerun.tensor_files import TensorEntry, read_json, tensor_entries

Progress = Callable[[str, float], None]  # (what is being done, fraction done in 0..1)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "su"})
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_HASH_STEP_BYTES = 1 << 23


class ModelConfig(Protocol):
    """What edgerun reads of a transformers configuration beyond attribute access."""

    model_type: str

    def to_dict(self) -> dict[str, Any]: ...


class Checkpoint:
    """An opened checkpoint folder. Tensors are views of the mapped files: treat them as read-only."""

    def __init__(
        self, folder: pathlib.Path, config: Any, generation: dict[str, Any], entries: dict[str, TensorEntry]
    ) -> None:
        self.folder = folder
        self.config = config  # transformers' configuration of the decoder
        self.generation = generation  # generation_config.json, or {}
        self.entries = entries
        self._maps: dict[pathlib.Path, mmap.mmap] = {}
        self._sha256: str | None = None

    @staticmethod
    def open(folder: pathlib.Path) -> Checkpoint:
        """Open `folder` (config.json, model.safetensors or its shards, tokenizer.json).

        Raises CheckpointError when something is missing, damaged or not supported.
        """
        folder = pathlib.Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder: pass a local Hugging Face checkpoint folder")
        raw_config = read_json(folder / "config.json")
        _check_rope(folder, raw_config)
        config = _decoder_config(folder, raw_config)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json: save the tokenizer with AutoTokenizer(...).save_pretrained(folder)"
            )
        read_json(folder / "tokenizer.json")
        generation_file = folder / "generation_config.json"
        generation = read_json(generation_file) if generation_file.is_file() else {}
        return Checkpoint(folder, config, generation, tensor_entries(folder))

    @property
    def architecture(self) -> str:
        """Class name of the model in transformers, for example LlamaForCausalLM."""
        return model_class(self.config).__name__

    @property
    def tokenizer_files(self) -> tuple[pathlib.Path, ...]:
        """The tokenizer's files that are there; tokenizer.json always is."""
        return tuple(self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file())

    @property
    def weight_files(self) -> tuple[pathlib.Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted({entry.file for entry in self.entries.values()}))

    def token_id(self, name: str) -> list[int]:
        """Ids of `bos_token_id` or `eos_token_id`: what generation_config.json says, else config.json; may be empty."""
        value = self.generation.get(name)
        if value is None:
            value = getattr(self.config, name, None)
        if value is None:
            return []
        return [int(token) for token in value] if isinstance(value, list) else [int(value)]

    def check_tensor(self, name: str, shape: Sequence[int]) -> None:
        """Raise CheckpointError unless tensor `name` is there with this shape."""
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"tensor {name!r} is missing from {self.folder}: {self.architecture} needs it "
                f"with shape {list(shape)}; the checkpoint is incomplete or of another architecture"
            )
        if entry.shape != tuple(shape):
            raise CheckpointError(
                f"tensor {name!r} in {entry.file.name} has shape {list(entry.shape)}, but config.json asks for "
                f"{list(shape)}: the weights and config.json are not of the same model"
            )

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` in its stored dtype and shape, a view of the mapped file (no copy)."""
        entry = self.entries[name]
        mapped = self._maps.get(entry.file)
        if mapped is None:
            with entry.file.open("rb") as file:
                # Private: torch wants a writable buffer, and a stray write can never reach the user's file.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[entry.file] = mapped
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        count = (entry.end - entry.start) // entry.dtype.itemsize
        return torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=entry.start).reshape(entry.shape)

    def release_pages(self) -> None:
        """Give back the memory of mapped pages read so far; views stay valid and read from the file again."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def sha256(self, progress: Progress | None = None) -> str:
        """sha256 (hex) over configuration, tokenizer and weight files, names included; computed once."""
        if self._sha256 is None:
            self._sha256 = self._hash(progress)
        return self._sha256

    def _hash(self, progress: Progress | None) -> str:
        small = [self.folder / name for name in ("config.json", "generation_config.json")]
        files = [path for path in small if path.is_file()] + [*self.tokenizer_files, *self.weight_files]
        total = sum(path.stat().st_size for path in files)
        done = 0
        digest = hashlib.sha256()
        for path in files:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            for block in _blocks(path):
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress("hash checkpoint", done / total)
        return digest.hexdigest()


def model_class(config: Any) -> type[torch.nn.Module]:
    """transformers' causal language model class for `config`."""
    import transformers

    mapping = transformers.AutoModelForCausalLM._model_mapping
    found: type[torch.nn.Module] = mapping[type(config)]
    return found


def _blocks(path: pathlib.Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_HASH_STEP_BYTES):
            yield block


def _check_rope(folder: pathlib.Path, raw: dict[str, Any]) -> None:
    """Refuse a rope type that is not known; transformers would only log it."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for one in nested or [parameters]:
        kind = one.get("rope_type", one.get("type", "default"))
        if kind not in _ROPE_TYPES:
            raise CheckpointError(
                f"{folder / 'config.json'} asks for rope type {kind!r}, which edgerun does not know: "
                f"it knows {', '.join(sorted(_ROPE_TYPES))}"
            )


def _decoder_config(folder: pathlib.Path, raw: dict[str, Any]) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = raw.get("architectures") or []
    model_type = raw.get("model_type")
    name = architectures[0] if architectures else model_type
    if "auto_map" in raw and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CheckpointError(f"{folder} needs model code of its own ({name}), which edgerun does not run")
    if raw.get("is_encoder_decoder") or _is_encoder_decoder(model_type):
        raise CheckpointError(f"{name} is an encoder-decoder model: edgerun exports decoder-only text models")
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if expected is None or (architectures and expected not in architectures):
        raise CheckpointError(
            f"{name} is not a decoder-only text model of transformers {transformers.__version__}: "
            "edgerun exports architectures that end in ForCausalLM or LMHeadModel"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        found = model_class(config)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder / 'config.json'} does not describe a valid {name}: {reason}") from None
    except Exception as error:
        # huggingface_hub's strict dataclasses raise kinds of their own for a field of the wrong type or value.
        if not type(error).__name__.startswith("Strict"):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder / 'config.json'} does not describe a valid {name}: {reason}") from None
    if not architectures and getattr(config, "is_decoder", True) is False:
        raise CheckpointError(f"{name} is an encoder-only model: edgerun exports decoder-only text models")
    _check_attention(name or "the model", config, found)
    return config


def _is_encoder_decoder(model_type: str | None) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES


def _check_attention(name: str, config: Any, found: type[torch.nn.Module]) -> None:
    if not getattr(found, "_supports_attention_backend", False):
        raise CheckpointError(
            f"the attention of {name} does not go through transformers' AttentionInterface, so edgerun cannot take "
            "its place: this architecture is not supported"
        )
    experts = next((count for key in _EXPERT_COUNTS if (count := getattr(config, key, None))), 0)
    if experts > 1:
        raise CheckpointError(f"{name} is a mixture of {experts} experts: edgerun exports dense decoders")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if others:
        raise CheckpointError(
            f"{name} has layers of type {', '.join(others)}: edgerun supports {' and '.join(sorted(_LAYER_TYPES))}"
        )
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise CheckpointError(f"{name} attends in both directions: edgerun exports causal decoders only")
