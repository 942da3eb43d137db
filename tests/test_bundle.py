"""A bundle is checked before it is used, and is never left half-written."""

from __future__ import annotations

import errno
import json
import pathlib
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edgerun import bundle as bundles
from edgerun.bundle import SCHEMA_VERSION, Bundle, BundleWriter, GoldenCase, existing_build
from edgerun.errors import BundleError
from edgerun.recipe import Recipe
from edgerun.zoo import zoo_model_path

BUILD = "ab" * 32


def manifest(build: str = BUILD) -> dict[str, Any]:
    return {
        "kind": "text",
        "edgerun_version": "0",
        "recipe": Recipe().to_json(),
        "build": build,
        "source": {"sha256": "0" * 64},
        "programs": [{"name": "text", "file": "programs/text.pte"}],
        "context": {"max_context": 64},
        "tokens": {"vocab_size": 264},
        "attention": {},
        "golden": [{"file": "golden/short.safetensors"}],
    }


def fill(writer: BundleWriter) -> None:
    (writer.subfolder("programs") / "text.pte").write_bytes(bytes(range(256)) * 16)
    tokenizer = (zoo_model_path("text") / "tokenizer.json").read_bytes()
    (writer.subfolder("tokenizer") / "tokenizer.json").write_bytes(tokenizer)
    case = GoldenCase(np.arange(3), np.arange(2), np.ones((3, 5), dtype=np.float32))
    case.save(writer.subfolder("golden") / "short.safetensors")


def write(out: pathlib.Path, build: str = BUILD, overwrite: bool = False) -> Bundle:
    with BundleWriter(out, overwrite) as writer:
        fill(writer)
        return writer.publish(manifest(build))


@pytest.fixture
def out(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "place" / "name.edgerun"
    path.parent.mkdir()
    return path


def change_manifest(out: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((out / "manifest.json").read_text())
    change(values)
    (out / "manifest.json").write_text(json.dumps(values))


def refused(out: pathlib.Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_published_bundle_opens(out: pathlib.Path) -> None:
    write(out)
    bundle = Bundle.open(out)
    assert bundle.build == BUILD
    assert bundle.recipe == Recipe()
    assert bundle.program_path.read_bytes()[:4] == b"\0\1\2\3"
    assert bundle.tokenizer().encode("ab").ids == [256, 97, 98]
    assert bundle.golden_cases()[0].logits.shape == (3, 5)


@pytest.mark.parametrize("name", ["programs/text.pte", "tokenizer/tokenizer.json", "golden/short.safetensors"])
def test_flipped_byte(name: str, out: pathlib.Path) -> None:
    write(out)
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(bytes(data))
    assert "sha256" in refused(out)
    Bundle.open(out, verify=False)


def test_truncated_file(out: pathlib.Path) -> None:
    write(out)
    file = out / "programs" / "text.pte"
    file.write_bytes(file.read_bytes()[:-1])
    assert "has 4095 bytes, its manifest says 4096" in refused(out)


def test_missing_file(out: pathlib.Path) -> None:
    write(out)
    (out / "programs" / "text.pte").unlink()
    assert "programs/text.pte is missing" in refused(out)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "programs/../../secret", "programs\\text.pte", "./x", ""])
def test_path_that_leaves_the_folder(name: str, out: pathlib.Path) -> None:
    write(out)
    (out.parent / "secret").write_bytes(b"x")
    change_manifest(out, lambda values: values["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    assert "leaves the bundle" in refused(out)


def test_link_that_leaves_the_folder(out: pathlib.Path) -> None:
    write(out)
    secret = out.parent / "secret"
    (out / "programs" / "text.pte").replace(secret)
    (out / "programs" / "text.pte").symlink_to(secret)
    assert "leaves the bundle" in refused(out)


def test_program_that_is_not_among_the_files(out: pathlib.Path) -> None:
    write(out)
    change_manifest(out, lambda values: values["programs"][0].update(file="../../x.pte"))
    assert "not among its files" in refused(out)


@pytest.mark.parametrize(("step", "remedy"), [(1, "update edgerun"), (-1, "export the bundle again")])
def test_another_schema(step: int, remedy: str, out: pathlib.Path) -> None:
    write(out)
    other = SCHEMA_VERSION + step
    change_manifest(out, lambda values: values.update(schema_version=other))
    assert f"schema version {other}, this edgerun reads version {SCHEMA_VERSION}: {remedy}" in refused(out)


@pytest.mark.parametrize("version", [None, "1", 0, True])
def test_schema_version_that_is_none(version: object, out: pathlib.Path) -> None:
    write(out)
    change_manifest(out, lambda values: values.update(schema_version=version))
    assert "no schema version" in refused(out)


@pytest.mark.parametrize("key", ["files", "programs", "recipe", "tokens"])
def test_manifest_without_a_key(key: str, out: pathlib.Path) -> None:
    write(out)
    change_manifest(out, lambda values: values.pop(key))
    assert f"no valid '{key}'" in refused(out)


def test_manifest_that_is_not_json(out: pathlib.Path) -> None:
    write(out)
    (out / "manifest.json").write_text("{")
    assert "cannot be read" in refused(out)


def test_folder_that_is_no_bundle(tmp_path: pathlib.Path) -> None:
    assert "is not a bundle" in refused(tmp_path)
    assert "is not a bundle" in refused(tmp_path / "nothing")


def test_recipe_of_another_version(out: pathlib.Path) -> None:
    write(out)
    change_manifest(out, lambda values: values["recipe"].update(unheard_of=1))
    with pytest.raises(BundleError, match="recipe that cannot be read"):
        _ = Bundle.open(out).recipe


def nothing_left(out: pathlib.Path) -> bool:
    return not list(out.parent.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_stopped_writing_leaves_nothing(error: type[BaseException], out: pathlib.Path) -> None:
    with pytest.raises(error), BundleWriter(out) as writer:
        fill(writer)
        raise error
    assert nothing_left(out)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files cannot grow beyond 1 KiB: writing more fails as it does on a full disk, with EFBIG in place of ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_nothing(small_files: None, out: pathlib.Path) -> None:
    with pytest.raises(BundleError, match="MiB are free there"):
        write(out)
    assert nothing_left(out)


def test_full_disk_keeps_the_old_bundle(out: pathlib.Path, request: pytest.FixtureRequest) -> None:
    write(out)
    request.getfixturevalue("small_files")
    with pytest.raises(BundleError):
        write(out, build="cd" * 32, overwrite=True)
    assert Bundle.open(out).build == BUILD


def test_failed_move_keeps_the_old_bundle_and_nothing_else(out: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(out)
    replace = pathlib.Path.replace

    def fail_to_publish(self: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
        if target == out and self.name != "bundle":
            raise OSError(errno.EIO, "input/output error")
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", fail_to_publish)
    with pytest.raises(BundleError, match="cannot write"):
        write(out, build="cd" * 32, overwrite=True)
    assert Bundle.open(out).build == BUILD
    assert list(out.parent.iterdir()) == [out]


def test_read_only_target(out: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles.os, "access", lambda path, mode: False)  # a superuser may write anywhere
    with pytest.raises(BundleError, match="is read-only"):
        write(out)
    assert nothing_left(out)


def test_target_folder_that_does_not_exist(tmp_path: pathlib.Path) -> None:
    with pytest.raises(BundleError, match="does not exist; create it first"):
        write(tmp_path / "nowhere" / "name.edgerun")


def test_another_build_needs_overwrite(out: pathlib.Path) -> None:
    write(out)
    with pytest.raises(BundleError, match="pass --overwrite"):
        write(out, build="cd" * 32)
    assert Bundle.open(out).build == BUILD
    write(out, build="cd" * 32, overwrite=True)
    assert Bundle.open(out).build == "cd" * 32
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_what_is_no_bundle_is_never_overwritten(out: pathlib.Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle"):
        write(out, overwrite=True)
    assert (out / "thesis.txt").is_file()


def test_existing_build_is_found_by_its_hash(out: pathlib.Path) -> None:
    assert existing_build(out, BUILD) is None
    write(out)
    found = existing_build(out, BUILD)
    assert found is not None
    assert found.build == BUILD
    assert existing_build(out, "cd" * 32) is None


def test_damaged_build_is_not_reused(out: pathlib.Path) -> None:
    write(out)
    (out / "programs" / "text.pte").write_bytes(b"x" * 4096)
    assert existing_build(out, BUILD) is None
