"""The bundle that the session tests share."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from edgerun.sessions.text import TextSession
from tests.shared_bundle import RECIPE, SharedBundle, shared_bundle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SharedBundle:
    return shared_bundle(tmp_path_factory, "tiny", RECIPE)


@pytest.fixture(scope="session")
def bundle(tiny: SharedBundle) -> pathlib.Path:
    return tiny.path


@pytest.fixture(scope="module")
def loaded(bundle: pathlib.Path) -> TextSession:
    return TextSession(bundle, threads=1)


@pytest.fixture
def session(loaded: TextSession) -> Iterator[TextSession]:
    loaded.reset()
    yield loaded
