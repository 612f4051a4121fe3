"""Let processes that mpirun or mpiexec started find each other the way torchrun's do."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

# Open MPI; MPICH and Intel MPI (Hydra). The launcher's own count is the one to trust.
_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def launched() -> bool:
    """Whether an MPI launcher started this process."""
    return _first(_SIZE) is not None


def bootstrap() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT from MPI.

    What is set already stays. Every process of the job must call it: it communicates.
    ValueError: no mpi4py, no MPI library, or an mpi4py that belongs to another MPI than mpirun.
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
    # With --oversubscribe Open MPI numbers a node's ranks otherwise than Split_type does.
    local_rank, local_size = _first(_LOCAL_RANK), _first(_LOCAL_SIZE)
    _set("RANK", world.Get_rank())
    _set("WORLD_SIZE", world.Get_size())
    _set("LOCAL_RANK", node.Get_rank() if local_rank is None else local_rank)
    _set("LOCAL_WORLD_SIZE", node.Get_size() if local_size is None else local_size)
    # Rank 0 listens, so it chooses; who that is may have been set before.
    first = world.allgather(os.environ["RANK"]).index("0")
    place = None
    if world.Get_rank() == first:
        one_node = node.Get_size() == world.Get_size()
        place = ("127.0.0.1" if one_node else _address(), free_port())
    address, port = world.bcast(place, root=first)
    _set("MASTER_ADDR", address)
    _set("MASTER_PORT", port)


def free_port() -> int:
    """A TCP port that nobody uses at this moment."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def _mpi() -> Any:
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
    said = str(error).splitlines()[0]
    return ValueError(f"mpi4py loads no MPI library ({said}): e.g. pip install mpich")


def _first(names: Sequence[str]) -> int | None:
    return next((int(os.environ[name]) for name in names if name in os.environ), None)


def _set(name: str, value: object) -> None:
    os.environ.setdefault(name, str(value))


def _address() -> str:
    """This host's name, which the other nodes of a cluster resolve."""
    return socket.gethostname()
