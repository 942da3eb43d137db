"""What XNNPACK is asked to take: everything ExecuTorch offers it, but for what it would compute as something else."""

from __future__ import annotations

import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import GeluConfig
from executorch.backends.xnnpack.partition.config.xnnpack_config import XNNPartitionerConfig
from torch.export.exported_program import ExportedProgram


class ExactGeluConfig(GeluConfig):  # type: ignore[misc]
    """GELU where it is the exact one. ExecuTorch 1.5 drops `approximate="tanh"` (Gemma) and lowers the exact GELU."""

    def check_constraints(self, node: torch.fx.Node, ep: ExportedProgram) -> bool:
        """Whether XNNPACK computes what `node` asks for."""
        return node.kwargs.get("approximate", "none") == "none" and bool(super().check_constraints(node, ep))


def partitioner_configs() -> list[type[XNNPartitionerConfig]]:
    """ExecuTorch's configurations, each op that would change its meaning left out."""
    return [ExactGeluConfig if config is GeluConfig else config for config in ALL_PARTITIONER_CONFIGS]
