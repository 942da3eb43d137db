"""Calibration: what `edgerun calibrate` chose for every layer of one model, and how well the choice was seen to hold.

One safetensors file: the boundary predictor's tensors, if it was trained, and one JSON text in the file's metadata.
It belongs to one checkpoint, by hash, and is refused for any other.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

from edgerun import __version__
from edgerun.bundle import sha256_of
from edgerun.errors import EdgerunError, ExportError
from edgerun.recipe import DhsaOptions

if TYPE_CHECKING:
    from edgerun.techniques.boundary_predictor import BoundaryPredictor, PredictorMetrics

SCHEMA_VERSION = 2
_METADATA = "edgerun_calibration"
_PREFIX = "boundary_predictor."


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The model that a calibration is for, in words."""

    model_type: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Achieved:
    """Teacher-forced KL to the dense model in decode, mean over texts with its 95 % interval, at one length."""

    length: int  # tokens
    texts: int
    mean_kl_nats: float
    low: float
    high: float
    density: float  # attended of causal pairs, prompt and decoded tokens together

    def holds(self, max_kl_nats: float) -> bool:
        """Whether even the interval's upper end keeps the target."""
        return self.high <= max_kl_nats


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A choice for every layer, what it was chosen for, and what it reached on text that it was not chosen by."""

    checkpoint_sha256: str
    model: ModelShape
    dhsa: DhsaOptions  # its `layers` are the choice
    max_kl_nats: float  # the target
    achieved: tuple[Achieved, ...]  # on proof text, by which nothing was chosen or narrowed, a length each
    text_sha256: str
    samples: int  # texts to choose by, as many to narrow by, and as many to prove on
    decode_tokens: int  # of every text, fed one by one
    seed: int
    predictor: PredictorMetrics | None = None
    edgerun_version: str = __version__
    sha256: str = ""  # of the file; "" before it is written

    @staticmethod
    def open(path: pathlib.Path) -> Calibration:
        """Read what `save` wrote. Raises EdgerunError for a file that is missing, cut short, or something else."""
        text = _metadata(path)
        try:
            values = json.loads(text)
            version = values.pop("schema_version")
            if version != SCHEMA_VERSION:
                remedy = "update edgerun" if version > SCHEMA_VERSION else "calibrate again"
                raise EdgerunError(f"{path} has schema {version}, this edgerun reads {SCHEMA_VERSION}: {remedy}")
            return _from_json(values, sha256_of(path))
        except (ValueError, TypeError, KeyError, AttributeError, ExportError) as error:
            raise EdgerunError(f"{path} holds a calibration that cannot be read ({error}): calibrate again") from None

    def save(self, path: pathlib.Path, predictor: BoundaryPredictor | None = None) -> Calibration:
        """Write the file, whole or not at all, and return this calibration with the file's sha256."""
        import safetensors.torch

        values: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        values["dhsa"] = self.dhsa.to_json()
        del values["sha256"]
        tensors = {} if predictor is None else predictor.state_dict()
        content = safetensors.torch.save(
            {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()},
            metadata={_METADATA: json.dumps(values, allow_nan=False)},
        )
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            beside = pathlib.Path(file.name)
            try:
                file.write(content)
                file.flush()
                beside.chmod(0o644)
                beside.replace(path)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
        return dataclasses.replace(self, sha256=sha256_of(path))

    def require(self, checkpoint_sha256: str) -> None:
        """Raise EdgerunError unless the calibration is of this checkpoint."""
        if checkpoint_sha256 != self.checkpoint_sha256:
            raise EdgerunError(
                f"the calibration is of the checkpoint {self.checkpoint_sha256[:16]} ({self.model.model_type}, "
                f"{self.model.layers} layers), this one is {checkpoint_sha256[:16]}: calibrate this checkpoint"
            )

    def manifest_entry(self) -> dict[str, Any]:
        """What a bundle's manifest says of it."""
        return {
            "sha256": self.sha256,
            "max_kl_nats": self.max_kl_nats,
            "achieved": [dataclasses.asdict(one) for one in self.achieved],
        }


def load_predictor(path: pathlib.Path) -> BoundaryPredictor:
    """The boundary predictor of a calibration file, ready to call on the keys of its `layer`.

    Raises EdgerunError when the file is no calibration, or was made with --skip-predictor.
    """
    import safetensors.torch

    from edgerun.techniques.boundary_predictor import BoundaryPredictor

    calibration = Calibration.open(path)
    tensors = safetensors.torch.load_file(path)
    if calibration.predictor is None:
        raise EdgerunError(f"{path} has no boundary predictor: calibrate without --skip-predictor")
    model = calibration.model
    predictor = BoundaryPredictor(model.kv_heads, model.head_dim, calibration.predictor.layer)
    try:
        predictor.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise EdgerunError(f"{path} holds another predictor than it says ({reason}): calibrate again") from None
    return predictor.eval().requires_grad_(False)


def _metadata(path: pathlib.Path) -> str:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise EdgerunError(f"{path} is not a file: make a calibration with `edgerun calibrate`")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA)
    except (SafetensorError, OSError) as error:
        raise EdgerunError(
            f"{path} is cut short or no calibration ({error}): make one with `edgerun calibrate`"
        ) from None
    if text is None:
        raise EdgerunError(f"{path} is a safetensors file, but no calibration: make one with `edgerun calibrate`")
    return str(text)


def _from_json(values: dict[str, Any], sha256: str) -> Calibration:
    from edgerun.techniques.boundary_predictor import PredictorMetrics

    model, metrics = ModelShape(**values["model"]), values["predictor"]
    if metrics is not None and metrics["layer"] not in range(model.layers):
        raise ValueError(f"its predictor is of layer {metrics['layer']!r} of {model.layers}")
    return Calibration(
        **{
            **values,
            "model": model,
            "dhsa": DhsaOptions.from_json(values["dhsa"]),
            "achieved": tuple(Achieved(**one) for one in values["achieved"]),
            "predictor": None if metrics is None else PredictorMetrics(**metrics),
            "sha256": sha256,
        }
    )
