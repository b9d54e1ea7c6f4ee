"""Training by several processes (`torchrun`), each with a share of every batch. A single process needs none of it.

All processes see the same batches; each takes every n-th row. Gradients are summed, weighted by the part of the mean
that each share makes up, so a step equals that of one process on the whole batch, up to rounding. Dropout differs
between processes. Validation is shared, too. The first process writes files and shows progress.

Tensors on the CPU travel by gloo, those on GPUs by NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from model.errors import RamrecError
from model.network.tensors import CPU, find_device

Number = TypeVar("Number", bound=np.generic)


class PeersError(RamrecError):
    """The processes cannot train together."""


@dataclass(frozen=True)
class Peers:
    """The processes that train together, as one of them sees it: its `rank`, from 0 to `size` − 1, and the device that
    each of them trains on.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """The rows of a batch that this process takes."""
        return slice(self.rank, None, self.size)

    def backward(self, network: torch.nn.Module, loss: Tensor | None, part: float) -> float:
        """Leave in `network` the gradients of the mean loss over all processes; returns that loss.

        Args:
            loss: of this process's rows; None if it has no rows.
            part: the weight of `loss` in the mean; the parts of all processes sum to 1.
        """
        if self.size == 1:
            assert loss is not None
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()
        if loss is not None:
            loss = loss * part
            loss.backward()  # type: ignore[no-untyped-call]
        parameters = list(network.parameters())
        summed = self._sum(_packed(parameters, loss))
        _unpack(summed, parameters)
        return float(summed[-1])

    def gathered(self, shares: NDArray[np.int64], total: int) -> NDArray[np.int64]:
        """The rows of all processes in their original order, (total,). shares: those of this process."""
        whole = np.zeros(total, np.int64)
        whole[self.share] = shares
        return whole if self.size == 1 else self._sum(torch.from_numpy(whole)).numpy()

    def synchronise(self, network: torch.nn.Module) -> None:
        """Give all processes the weights of the first one, as different machines may round differently."""
        if self.size > 1:
            for values in network.state_dict().values():
                distributed.broadcast(values, 0)

    def from_first(self, values: NDArray[Number]) -> NDArray[Number]:
        """The values of the first process; their shape must be the same in all processes."""
        if self.size == 1:
            return values
        shared = torch.from_numpy(np.ascontiguousarray(values))
        distributed.broadcast(shared, 0)
        return np.asarray(shared.numpy(), values.dtype)

    def agree(self, value: int, what: str) -> None:
        """Raise PeersError in all processes unless they hold the same value; `what` names it."""
        if self.size > 1:
            found = self.gathered(np.array([value]), self.size)
            if len(set(found.tolist())) > 1:
                raise PeersError(f"the processes differ in {what}: {found.tolist()}")

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Use random numbers that differ between processes; afterwards torch's generators are where they were."""
        if self.size == 1:
            yield
            return
        gpus = [torch.cuda.current_device()] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(int(torch.randint(2**31, (1,))) + self.seed_shift)
            yield

    @property
    def seed_shift(self) -> int:
        """Added to a seed, it gives each process its own random numbers, and the first one those of the seed."""
        return self.rank << 32

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.size > 1:
            distributed.barrier()

    def _sum(self, values: Tensor) -> Tensor:
        distributed.all_reduce(values)
        return values


ALONE = Peers()


@contextmanager
def joined(device: str = "cpu") -> Iterator[Peers]:
    """Join the processes that `torchrun` started; without torchrun, this process alone. If one process fails, torchrun
    ends the others.

    Args:
        device: see `find_device`. On GPUs, each process of a machine takes its own.

    Raises:
        DeviceError: the device cannot be used.
        PeersError: the processes do not find each other, or a machine has more processes than GPUs.
    """
    where = find_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Peers(device=where)
        return
    if where.type == "cuda":
        _take_gpu()
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise PeersError(f"cannot join the other processes: {error}") from error
    peers = Peers(distributed.get_rank(), distributed.get_world_size(), where)
    try:
        yield peers
        peers.wait()
    finally:
        distributed.destroy_process_group()


def _take_gpu() -> None:
    """Make the GPU of this process its current one; NCCL refuses two processes on one GPU."""
    number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= gpus:
        raise PeersError(f"process {number + 1} of this machine has no GPU of its own: there are {gpus}")
    torch.cuda.set_device(number)


def _packed(parameters: list[torch.nn.Parameter], loss: Tensor | None) -> Tensor:
    """All gradients, for each parameter whether it has one, and the loss: one tensor, summed in one round."""
    grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in parameters]
    has_grad = grads[0].new_tensor([weight.grad is not None for weight in parameters])
    last = grads[0].new_zeros(1) if loss is None else loss.detach().to(grads[0]).reshape(1)
    return torch.cat([*(grad.reshape(-1) for grad in grads), has_grad, last])


def _unpack(summed: Tensor, parameters: list[torch.nn.Parameter]) -> None:
    """Write the summed gradients back; a parameter without a gradient in any process gets none."""
    sizes = [weight.numel() for weight in parameters]
    *grads, has_grad, _ = torch.split(summed, [*sizes, len(parameters), 1])
    for parameter, grad, count in zip(parameters, grads, has_grad.tolist(), strict=True):
        parameter.grad = grad.reshape(parameter.shape) if count else None
