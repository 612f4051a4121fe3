"""torch.distributed under mpirun or mpiexec: the variables that torchrun would set, from MPI."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

# Set by Open MPI; by MPICH and Intel MPI (Hydra). The launcher's own numbers are the right ones.
_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def launched() -> bool:
    """Return whether an MPI launcher has started this process."""
    return _first(_SIZE) is not None


def bootstrap() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT from MPI.

    Variables that are set already keep their values. Every process of the job must call this: it
    communicates by MPI.

    Raises:
        ValueError: there is no mpi4py or no MPI library, or mpi4py uses another MPI than mpirun.
    """
    mpi = _mpi()
    world = mpi.COMM_WORLD
    expected = _first(_SIZE)
    if expected is not None and expected != world.Get_size():
        raise ValueError(
            f"mpirun started {expected} processes, but mpi4py sees {world.Get_size()}: it loads "
            f"another MPI ({mpi.Get_library_version().splitlines()[0]}). Use the mpirun of that "
            "MPI, or pip install mpi4py again with this one's mpicc on PATH"
        )
    node = world.Split_type(mpi.COMM_TYPE_SHARED)
    # With --oversubscribe Open MPI numbers a node's ranks in another order than Split_type does.
    local_rank, local_size = _first(_LOCAL_RANK), _first(_LOCAL_SIZE)
    _set("RANK", world.Get_rank())
    _set("WORLD_SIZE", world.Get_size())
    _set("LOCAL_RANK", node.Get_rank() if local_rank is None else local_rank)
    _set("LOCAL_WORLD_SIZE", node.Get_size() if local_size is None else local_size)
    # Torch's rank 0 will listen, so it chooses. RANK may have been set before, not as MPI counts.
    root = world.allgather(os.environ["RANK"]).index("0")
    endpoint = None
    if world.Get_rank() == root:
        is_one_node = node.Get_size() == world.Get_size()
        endpoint = ("127.0.0.1" if is_one_node else _address(), free_port())
    address, port = world.bcast(endpoint, root=root)
    _set("MASTER_ADDR", address)
    _set("MASTER_PORT", port)


def free_port() -> int:
    """Return a TCP port of this host that no process uses at this moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _mpi() -> Any:
    """Import and return mpi4py's MPI; ValueError if it, or the MPI library, is not installed."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        if error.name == "mpi4py":
            raise ValueError(
                "starting under mpirun needs mpi4py: pip install 'spectral-dist[mpi]'"
            ) from None
        raise _no_library(error) from error
    except RuntimeError as error:
        raise _no_library(error) from error
    return MPI


def _no_library(error: Exception) -> ValueError:
    """Return the error to raise if mpi4py cannot load an MPI library."""
    reason = str(error).splitlines()[0]
    return ValueError(f"mpi4py loads no MPI library ({reason}): e.g. pip install mpich")


def _first(names: Sequence[str]) -> int | None:
    """Return the number in the first of these variables that is set; None if none is."""
    return next((int(os.environ[name]) for name in names if name in os.environ), None)


def _set(name: str, value: object) -> None:
    """Set an environment variable unless it is set already."""
    os.environ.setdefault(name, str(value))


def _address() -> str:
    """Return this host's name, which the other nodes of the cluster can resolve."""
    return socket.gethostname()
