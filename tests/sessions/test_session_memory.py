"""Memory follows the context that is used: one model, exported for 2K and for 32K tokens, after the same 1K prompt."""

from __future__ import annotations

import pathlib

import pytest

from edgerun.devices import RunRequest, open_device
from edgerun.recipe import Recipe
from tests.shared_bundle import shared_bundle

LIMIT_BYTES = 64 << 20  # more than the short bundle: the most that reserving 30K more tokens may cost
# State of the 32K bundle, were it touched: 32,768 tokens x 2 layers x 8 KV heads x 64 x (key + value) x 4 bytes.
RESERVED_BYTES = 32768 * 2 * 8 * 64 * 2 * 4
CHANGES = {"max_position_embeddings": 32768, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}


def peak_rss_bytes(bundle: pathlib.Path) -> int:
    request = RunRequest(tuple(i % 251 for i in range(1024)), max_new_tokens=4, threads=1)
    return int(open_device("host").run(bundle, request).values["peak_rss_bytes"])


@pytest.mark.slow
def test_reserved_context_costs_no_memory(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert RESERVED_BYTES > 2 * LIMIT_BYTES
    short, long = (
        shared_bundle(
            tmp_path_factory, f"context-{length}", Recipe(max_context=length, prefill_slice=256), **CHANGES
        ).path
        for length in (2048, 32768)
    )
    peaks = [peak_rss_bytes(long), peak_rss_bytes(short)]
    print(peaks)
    assert peaks[0] - peaks[1] <= LIMIT_BYTES
