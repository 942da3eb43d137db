"""Memory follows the context that is used: one model, exported for 2K and for 32K tokens."""

from __future__ import annotations

import pathlib
import re

import pytest

from edgerun.devices import RunRequest, open_device
from edgerun.recipe import Recipe
from edgerun.sessions.text import TextSession
from tests.shared_bundle import shared_bundle

LIMIT_BYTES = 64 << 20  # more than the short bundle: the most that reserving 30K more tokens may cost
# State of the 32K bundle, were it touched: 32,768 tokens x 2 layers x 8 KV heads x 64 x (key + value) x 4 bytes.
RESERVED_BYTES = 32768 * 2 * 8 * 64 * 2 * 4
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage")
CHANGES = {"max_position_embeddings": 32768, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}


# Of a token: 2 layers x 8 KV heads x 64 x (key + value + mean and variance of 16 keys) x 4 bytes.
TOKEN_BYTES = 2 * 8 * 64 * 4 * (2 + 2 / 16)


def bundle_of(factory: pytest.TempPathFactory, context: int) -> pathlib.Path:
    return shared_bundle(factory, f"context-{context}", Recipe(max_context=context, prefill_slice=256), **CHANGES).path


def peak_rss_bytes(bundle: pathlib.Path) -> int:
    request = RunRequest(tuple(i % 251 for i in range(1024)), max_new_tokens=4, threads=1)
    return int(open_device("host").run(bundle, request).values["peak_rss_bytes"])


@pytest.mark.slow
def test_reserved_context_costs_no_memory(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert RESERVED_BYTES > 2 * LIMIT_BYTES
    short, long = (bundle_of(tmp_path_factory, context) for context in (2048, 32768))
    peaks = [peak_rss_bytes(long), peak_rss_bytes(short)]
    print(peaks)
    assert peaks[0] - peaks[1] <= LIMIT_BYTES


def advised_bytes() -> tuple[int, int]:
    """Of this process's memory for which huge pages were asked: its size, and what of it is in RAM."""
    size = resident = 0
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", pathlib.Path("/proc/self/smaps").read_text()):
        if re.search(r"^VmFlags:.* hg\b", mapping, re.MULTILINE):
            size += int(re.search(r"^Size: +(\d+)", mapping, re.MULTILINE)[1]) * 1024  # type: ignore[index]
            resident += int(re.search(r"^Rss: +(\d+)", mapping, re.MULTILINE)[1]) * 1024  # type: ignore[index]
    return size, resident


@pytest.mark.slow
@pytest.mark.skipif(not HUGE_PAGES.is_dir(), reason="this system has no transparent huge pages")
@pytest.mark.parametrize(("context", "tokens"), [(2048, 2048), (32768, 17000)], ids=["cache full", "heads in part"])
def test_huge_pages_hold_only_what_the_prompt_fills(
    tmp_path_factory: pytest.TempPathFactory, context: int, tokens: int
) -> None:
    """A head's keys of 17,000 tokens take 4.2 MiB, so that they contain a page of 2 MiB wherever they begin."""
    session = TextSession(bundle_of(tmp_path_factory, context), threads=1)
    before = advised_bytes()
    session.generate([i % 251 for i in range(tokens)], max_new_tokens=0)
    size, resident = (after - start for after, start in zip(advised_bytes(), before, strict=True))
    assert 0 < size <= tokens * TOKEN_BYTES
    assert resident == size
