"""Bundle: the folder that an export makes and every device reads.

    NAME.edgerun/  manifest.json  programs/text.pte  tokenizer/tokenizer.json …  golden/*.safetensors

The manifest is the only source of facts. Opening checks its schema, that no path leaves the folder, and every file's
size and sha256 before a byte reaches a runtime. Writing happens beside the final name and is moved there when complete,
so that an export that is stopped, or meets a full disk, leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgerun.errors import BundleError, EdgerunError
from edgerun.recipe import Recipe

if TYPE_CHECKING:
    import tokenizers

SCHEMA_VERSION = 4  # also of the arguments that programs pass to the ops; csrc/runtime/bundle_files.h has the same
MANIFEST = "manifest.json"
_REQUIRED = {
    "kind": str,
    "recipe": dict,
    "build": str,
    "source": dict,
    "programs": list,
    "files": dict,
    "tokens": dict,
    "golden": list,
}
_REQUIRED_OF_KIND = {"text": {"context": dict, "attention": dict}, "video": {"chains": dict, "video": dict}}
_HASH_STEP_BYTES = 1 << 23


@dataclasses.dataclass(frozen=True)
class GoldenCase:
    """A prompt, tokens forced after it, and the model's own logits after the prompt and after each forced token."""

    prompt: np.ndarray  # int64 [n]
    forced: np.ndarray  # int64 [k]
    logits: np.ndarray  # float32 [k + 1, vocab]

    def save(self, path: pathlib.Path) -> None:
        """Write as safetensors."""
        from safetensors.numpy import save

        path.write_bytes(save({"prompt": self.prompt, "forced": self.forced, "logits": self.logits}))

    @staticmethod
    def load(path: pathlib.Path) -> GoldenCase:
        """Read what `save` wrote. Raises BundleError for anything else."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors = load(path.read_bytes())
            return GoldenCase(tensors["prompt"], tensors["forced"], tensors["logits"])
        except (OSError, SafetensorError, KeyError) as error:
            raise BundleError(f"golden case {path} cannot be read ({error}): export the bundle again") from None


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle that was checked when it was opened."""

    path: pathlib.Path
    manifest: dict[str, Any]

    @staticmethod
    def open(path: pathlib.Path, verify: bool = True, kind: str | None = None) -> Bundle:
        """Open and check a bundle: schema, paths, sizes and, with `verify`, sha256 of every file.

        kind: "text" or "video", where only one will do. Raises BundleError when anything is not as the manifest says.
        """
        path = pathlib.Path(path)
        manifest = _read_manifest(path)
        if kind is not None:
            Bundle(path, manifest).require_kind(kind)
        for name, facts in manifest["files"].items():
            _check_file(path, name, facts, verify)
        for entry in [*manifest["programs"], *manifest["golden"]]:
            if not isinstance(entry, dict) or entry.get("file") not in manifest["files"]:
                raise BundleError(
                    f"{path / MANIFEST} lists a program or golden case whose file is not among its files: "
                    "the bundle is damaged, export it again"
                )
        if "tokenizer/tokenizer.json" not in manifest["files"]:
            raise BundleError(f"{path} has no tokenizer/tokenizer.json: the bundle is damaged, export it again")
        return Bundle(path, manifest)

    @property
    def build(self) -> str:
        """Identity of the build: sha256 (hex) over recipe and checkpoint."""
        return str(self.manifest["build"])

    @property
    def kind(self) -> str:
        """ "text" or "video"."""
        return str(self.manifest["kind"])

    def require_kind(self, kind: str) -> None:
        """Raise BundleError when the bundle is of another kind."""
        if self.kind != kind:
            raise BundleError(f"{self.path} is a {self.kind} bundle, this needs a {kind} bundle")

    @property
    def recipe(self) -> Recipe:
        """A text bundle's recipe, with max_context filled in. Raises BundleError for options that are not known."""
        self.require_kind("text")
        try:
            return Recipe.from_json(self.manifest["recipe"])
        except (KeyError, TypeError, EdgerunError) as error:
            raise BundleError(f"{self.path / MANIFEST} holds a recipe that cannot be read ({error})") from None

    @property
    def program_path(self) -> pathlib.Path:
        """The text program (.pte)."""
        for program in self.manifest["programs"]:
            if program.get("name") == "text":
                return self.path / str(program["file"])
        raise BundleError(f"{self.path} has no program named 'text': it cannot generate text")

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer that belongs to the model."""
        import tokenizers

        file = self.path / "tokenizer" / "tokenizer.json"
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the tokenizers library raises plain Exception for a file it cannot parse
            raise BundleError(f"{file} cannot be read ({error}): export the bundle again") from None

    def golden_cases(self) -> list[GoldenCase]:
        """The golden cases, in the manifest's order."""
        return [GoldenCase.load(self.path / str(case["file"])) for case in self.manifest["golden"]]


def kind_of(path: pathlib.Path) -> str:
    """ "text" or "video", by the manifest alone. Raises BundleError for what is no bundle."""
    return str(_read_manifest(pathlib.Path(path))["kind"])


class BundleWriter:
    """Writes a bundle beside its final name; `publish` moves it there. Leaving without publishing removes it all.

    with BundleWriter(out) as writer:
        (writer.folder / "programs" / "text.pte").write_bytes(...)
        bundle = writer.publish(manifest)
    """

    def __init__(self, out: pathlib.Path, overwrite: bool = False) -> None:
        """Raises BundleError when `out` cannot be written: it is there already, or its folder is not writable."""
        self.out = pathlib.Path(out).absolute()
        self._overwrite = overwrite
        self.folder = pathlib.Path()
        check_target(self.out, overwrite)

    def __enter__(self) -> BundleWriter:
        try:
            self.folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=self.out.parent))
            self.folder.chmod(0o755)
        except OSError as error:
            raise _write_error(self.out, error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _TARGET_ERRORS:
            raise _write_error(self.out, error) from error

    def subfolder(self, name: str) -> pathlib.Path:
        """A folder of the bundle, made when it is not there."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder

    def file_facts(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of every file written so far, the manifest left out, for the manifest's "files"."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.name != MANIFEST)
        return {
            path.relative_to(self.folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in files
        }

    def write_manifest(self, manifest: dict[str, Any]) -> Bundle:
        """Write `manifest` with schema version and file facts filled in; the unpublished bundle can then be tried."""
        whole = {"schema_version": SCHEMA_VERSION, **manifest, "files": self.file_facts()}
        (self.folder / MANIFEST).write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        return Bundle(self.folder, whole)

    def publish(self, manifest: dict[str, Any]) -> Bundle:
        """Write the manifest, move the folder to its final name, and return the bundle there."""
        whole = self.write_manifest(manifest).manifest
        _sync(self.folder)
        with contextlib.ExitStack() as undo:
            if self.out.exists():
                check_target(self.out, self._overwrite)
                aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{self.out.name}.old.", dir=self.out.parent))
                undo.callback(lambda: None if any(aside.iterdir()) else aside.rmdir())
                self.out.replace(aside / "bundle")
                undo.callback(lambda: (aside / "bundle").replace(self.out))
                self.folder.replace(self.out)
                undo.pop_all()
                shutil.rmtree(aside, ignore_errors=True)
            else:
                self.folder.replace(self.out)
        return Bundle(self.out, whole)


def existing_build(out: pathlib.Path, build: str) -> Bundle | None:
    """The complete bundle of this very build at `out`, or None. The manifest decides, never the name."""
    if not (pathlib.Path(out) / MANIFEST).is_file():
        return None
    try:
        bundle = Bundle.open(out)
    except BundleError:
        return None
    return bundle if bundle.build == build else None


def check_target(out: pathlib.Path, overwrite: bool) -> None:
    """Raise BundleError unless a bundle can be written at `out`. Only a bundle is ever overwritten."""
    parent = out.parent
    if not parent.is_dir():
        raise BundleError(f"cannot write {out}: folder {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BundleError(f"cannot write {out}: folder {parent} is read-only; choose another target")
    if not out.exists() and not out.is_symlink():
        return
    if not (out / MANIFEST).is_file():
        raise BundleError(f"{out} is there and is not a bundle: remove it, or choose another name")
    if not overwrite:
        raise BundleError(f"{out} is there and holds another build: pass --overwrite, or choose another name")


def sha256_of(path: pathlib.Path) -> str:
    """sha256 of a file's bytes, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_STEP_BYTES):
            digest.update(block)
    return digest.hexdigest()


_TARGET_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})


def _write_error(out: pathlib.Path, error: OSError) -> BundleError:
    free = shutil.disk_usage(out.parent).free if out.parent.is_dir() else 0
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return BundleError(
            f"cannot write {out}: {os.strerror(error.errno or 0).lower()}, {free / 2**20:.0f} MiB are free there; "
            "make room, or choose another target"
        )
    return BundleError(f"cannot write {out}: {os.strerror(error.errno or 0).lower()}; choose another target")


def _sync(folder: pathlib.Path) -> None:
    """Push every file to the disk, where a late write error would otherwise be lost."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}; make one with `edgerun export`") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{file} cannot be read ({error}): the bundle is damaged, export it again") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{file} states no schema version: the bundle is damaged, export it again")
    if version != SCHEMA_VERSION:
        remedy = "update edgerun" if version > SCHEMA_VERSION else "export the bundle again"
        raise BundleError(f"{file} has schema version {version}, this edgerun reads version {SCHEMA_VERSION}: {remedy}")
    if manifest.get("kind") not in _REQUIRED_OF_KIND:
        raise BundleError(
            f"{file} is of the kind {manifest.get('kind')!r}, which this edgerun does not know: update it"
        )
    for name, kind in (_REQUIRED | _REQUIRED_OF_KIND[manifest["kind"]]).items():
        if not isinstance(manifest.get(name), kind):
            raise BundleError(f"{file} has no valid {name!r}: the bundle is damaged, export it again")
    found: dict[str, Any] = manifest
    return found


def _check_file(bundle: pathlib.Path, name: str, facts: Any, verify: bool) -> None:
    pure = pathlib.PurePosixPath(name)
    inside = not pure.is_absolute() and ".." not in pure.parts and "\\" not in name and str(pure) == name
    file = bundle / name
    if not inside or not file.resolve().is_relative_to(bundle.resolve()):
        raise BundleError(f"{bundle / MANIFEST} names {name!r}, which leaves the bundle: do not use this bundle")
    if not isinstance(facts, dict) or not isinstance(facts.get("bytes"), int):
        raise BundleError(f"{bundle / MANIFEST} states no size for {name!r}: export the bundle again")
    if not file.is_file():
        raise BundleError(f"{name} is missing from {bundle}: copy the bundle again, or export it again")
    size = file.stat().st_size
    if size != facts["bytes"]:
        raise BundleError(f"{file} has {size} bytes, its manifest says {facts['bytes']}: copy the bundle again")
    if verify and sha256_of(file) != facts.get("sha256"):
        raise BundleError(f"{file} is damaged: its sha256 is not what its manifest says; copy the bundle again")
