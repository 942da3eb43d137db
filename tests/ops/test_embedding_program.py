"""A lowered program whose embedding and head share a table holds that table once, outside the delegate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

from edgerun.ops import embedding_logits, embedding_lookup
from tests.ops.embedding_tables import TABLE_DTYPES, random_table

VOCAB, HIDDEN = 1024, 64


class TiedModel(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        table, scales = random_table(dtype, VOCAB, HIDDEN, seed=0)
        self.register_buffer("table", table)
        self.register_buffer("scales", scales)
        self.linear = torch.nn.Linear(HIDDEN, HIDDEN)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(embedding_lookup.lookup(self.table, self.scales, ids))
        return embedding_logits.logits(hidden[:, -1], self.table, self.scales)


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_a_tied_table_is_stored_once(dtype: torch.dtype, tmp_path: Path) -> None:
    model = TiedModel(dtype).eval().requires_grad_(False)
    lengths = torch.export.Dim("tokens", min=1, max=16)
    program = torch.export.export(model, (torch.tensor([[1, 2, 3]]),), dynamic_shapes=({1: lengths},))
    lowered = to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=False)
    ).to_executorch()
    names = [getattr(node.target, "__name__", "") for node in lowered.exported_program().graph.nodes]
    assert "embedding_lookup.out" in names and "embedding_logits.out" in names and "executorch_call_delegate" in names
    with (tmp_path / "tied.pte").open("wb") as file:
        lowered.write_to_file(file)
    unique_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert unique_bytes <= (tmp_path / "tied.pte").stat().st_size <= unique_bytes + 16 * 1024
