"""Training by several processes, each with a share of every batch (`torchrun`); one process alone needs nothing of it.

A batch is the same for all; each process takes every n-th row. Gradients are summed, weighted by each share's part of
what the loss is a mean over, so that a step is that of the whole batch by one process, up to rounding. Dropout differs
between processes. Validation is shared out, too. The first process writes files and shows progress.

gloo for tensors on the CPU, NCCL for those on a GPU.
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

Number = TypeVar("Number", bound=np.generic)


class PeersError(RamrecError):
    """The processes cannot train together."""


@dataclass(frozen=True)
class Peers:
    """The processes that train together, as one of them sees it; `rank` from 0 to `size` − 1."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """The one that writes files and shows progress."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Which rows of a batch are this process's."""
        return slice(self.rank, None, self.size)

    def backward(self, network: torch.nn.Module, loss: Tensor | None, part: float) -> float:
        """Leave in `network` the gradients of the mean loss over all processes; returns that loss.

        Args:
            loss: of this process's rows; None where it has none.
            part: its part in the mean; all parts are 1 together.
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
        """(total,) every process's rows together, each in its place."""
        whole = np.zeros(total, np.int64)
        whole[self.share] = shares
        return whole if self.size == 1 else self._sum(torch.from_numpy(whole)).numpy()

    def synchronise(self, network: torch.nn.Module) -> None:
        """Give every process the first one's weights: they are the same but for what different machines round."""
        if self.size > 1:
            for values in network.state_dict().values():
                distributed.broadcast(values, 0)

    def from_first(self, values: NDArray[Number]) -> NDArray[Number]:
        """The first process's values for all; of the same shape everywhere."""
        if self.size == 1:
            return values
        shared = torch.from_numpy(np.ascontiguousarray(values))
        distributed.broadcast(shared, 0)
        return np.asarray(shared.numpy(), values.dtype)

    def agree(self, value: int, what: str) -> None:
        """Raises PeersError, everywhere, where the processes do not hold the same value."""
        if self.size > 1:
            found = self.gathered(np.array([value]), self.size)
            if len(set(found.tolist())) > 1:
                raise PeersError(f"the processes differ in {what}: {found.tolist()}")

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Random numbers of torch's that differ between processes; afterwards all are where they were."""
        if self.size == 1:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,))) + self.seed_shift)
            yield

    @property
    def seed_shift(self) -> int:
        """Added to a seed it gives each process random numbers of its own, the first one those of the seed."""
        return self.rank << 32

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            distributed.barrier()

    def _sum(self, values: Tensor) -> Tensor:
        distributed.all_reduce(values)
        return values


ALONE = Peers()


@contextmanager
def joined() -> Iterator[Peers]:
    """The processes that `torchrun` started; this one alone where it did not. A process that fails ends all: torchrun
    ends the others.

    Raises:
        PeersError: they do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    try:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise PeersError(f"cannot join the other processes: {error}") from error
    peers = Peers(distributed.get_rank(), distributed.get_world_size())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        yield peers
        peers.wait()
    finally:
        distributed.destroy_process_group()


def _packed(parameters: list[torch.nn.Parameter], loss: Tensor | None) -> Tensor:
    """All gradients, which of them there are, and the loss, in one tensor: one round a step."""
    grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    there = grads[0].new_tensor([one.grad is not None for one in parameters])
    told = grads[0].new_zeros(1) if loss is None else loss.detach().to(grads[0]).reshape(1)
    return torch.cat([*(one.reshape(-1) for one in grads), there, told])


def _unpack(summed: Tensor, parameters: list[torch.nn.Parameter]) -> None:
    """Gradients back; what no process has a gradient of has none."""
    sizes = [one.numel() for one in parameters]
    *grads, there, _ = torch.split(summed, [*sizes, len(parameters), 1])
    for parameter, grad, count in zip(parameters, grads, there.tolist(), strict=True):
        parameter.grad = grad.reshape(parameter.shape) if count else None
