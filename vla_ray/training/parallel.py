"""What a training process needs to know of the others, if there are any: gradients, sums, whole states.

One process, DDP (every worker holds everything) or FSDP2 (weights, gradients and optimiser state in shards). The loop
is the same for all three. States are saved and loaded whole, so that they fit any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among the workers.

    Attributes:
        kind: single | ddp | fsdp.
        bfloat16: compute in bfloat16; weights, their gradients and the optimiser stay float32.
    """

    kind: str = "single"
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bfloat16: bool = False

    def wrap(self, policy: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
        """The module that the loop calls. `layers` are what FSDP gathers one at a time."""
        policy.to(self.device)
        if self.kind == "ddp":
            ids = [self.device] if self.device.type == "cuda" else None
            return DistributedDataParallel(policy, device_ids=ids, gradient_as_bucket_view=True)
        if self.kind == "fsdp":
            precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.bfloat16 else MixedPrecisionPolicy()
            mesh = dist.init_device_mesh(self.device.type, (self.size,))
            for layer in layers:
                fully_shard(layer, mesh=mesh, mp_policy=precision)
            fully_shard(policy, mesh=mesh, mp_policy=precision)
            register_fsdp_forward_method(policy, "decode")
        return policy

    def autocast(self) -> Any:
        """FSDP casts weights itself, as it gathers them."""
        if self.bfloat16 and self.kind != "fsdp":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    @contextmanager
    def accumulating(self, module: nn.Module, more: bool) -> Iterator[None]:
        """Inside, gradients are exchanged only if no more passes follow in this step."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(not more)
            yield
        elif more and isinstance(module, DistributedDataParallel):
            with module.no_sync():
                yield
        else:
            yield

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the workers."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def settle(self, module: nn.Module) -> None:
        """After passes without backward: FSDP keeps what it has gathered for a backward pass that never comes, and
        gathered weights are not those that the optimiser knows."""
        if isinstance(module, FSDPModule):
            module.reshard()

    def model_state(self, module: nn.Module, trained_only: bool) -> dict[str, Tensor]:
        """Whole weights on the CPU by the unwrapped module's names; of rank 0, empty elsewhere. All must call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
        return dict(get_model_state_dict(module, options=options))  # type: ignore[arg-type]  # tensors alone

    def optimizer_state(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The same for the optimiser: its state by parameter name."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_optimizer_state_dict(module, optimizer, options=options)

    def load_optimizer(self, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Of `optimizer_state`, every worker with the whole state."""
        set_optimizer_state_dict(module, optimizer, state, options=StateDictOptions(full_state_dict=True))


def whole(value: Tensor) -> Tensor:
    """A tensor that FSDP may have spread over the workers, as an ordinary one."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
