"""Whether this process is one of several, and where the others are: settings, or the launcher.

Without evidence of a second process nothing is waited for and nothing is asked, so that a laptop
starts at once. JAX itself reads what the launcher has set (`jax._src.clusters`); here is only told
whether there is something to read. No JAX and no network in this file.
"""

import importlib.util
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llm.config import DistributedConfig
from llm.errors import UsageError


@dataclass(frozen=True)
class Cluster:
    """What `jax.distributed.initialize` is told. coordinator "": JAX asks the launcher `method`
    names, or the first that it knows."""

    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1
    method: str | None = None
    launcher: str = "distributed.coordinator"


def find_cluster(
    settings: DistributedConfig,
    environment: Mapping[str, str],
    installed: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
) -> Cluster | None:
    """The processes that this one belongs to; None: it is alone.

    `distributed.num_processes = 1` is alone whatever a launcher has set.

    Raises:
      UsageError: settings given by half, or a launcher that JAX needs a package for.
    """
    if settings != DistributedConfig(timeout=settings.timeout):
        return _given(settings)
    if _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") > 1 and {
        "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID",
    } <= set(environment):  # fmt: skip
        return Cluster(method="slurm", launcher="SLURM")
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return Cluster(launcher="Open MPI")
    if _number(environment, "PMI_SIZE", "PMIX_SIZE") > 1:
        _need(installed, "mpi4py", "an MPI launcher")
        return Cluster(method="mpi4py", launcher="MPI")
    if _on_tpu(environment, installed):
        return Cluster(launcher="the TPU's metadata")
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environment):
        _need(installed, "kubernetes", "an indexed Kubernetes job")
        return Cluster(launcher="Kubernetes")
    return None


def _given(settings: DistributedConfig) -> Cluster | None:
    """The settings, all three of them."""
    coordinator, count, index = settings.coordinator, settings.num_processes, settings.process_id
    if count == 1:
        return None
    host, _, port = coordinator.rpartition(":")
    found = (
        f"found distributed.coordinator = {coordinator!r}, distributed.num_processes = {count}, "
        f"distributed.process_id = {index}"
    )
    if not coordinator or count == 0 or index == -1:
        raise UsageError(
            "distributed: expected coordinator, num_processes and process_id together, or none of "
            f"them (they are then found under SLURM, MPI, GKE and on TPUs); {found}"
        )
    if not host or not port.isdecimal():
        raise UsageError(f"distributed.coordinator: expected HOST:PORT of process 0; {found}")
    if index >= count:
        raise UsageError(
            f"distributed.process_id: expected 0 to {count - 1}, since there are {count}; {found}"
        )
    return Cluster(coordinator, count, index, method="deactivate")


def _on_tpu(environment: Mapping[str, str], installed: Callable[[str], bool]) -> bool:
    """Whether JAX will use a TPU's chips here; of several hosts or of one, its own metadata says.

    Importing JAX sets TPU_SKIP_MDS_QUERY where there are no chips.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    wanted = not platforms or "tpu" in platforms.split(",")
    return wanted and installed("libtpu") and "TPU_SKIP_MDS_QUERY" not in environment


def _number(environment: Mapping[str, str], *names: str) -> int:
    """The first of these variables that is set; 0 where none is."""
    value = next((environment[name] for name in names if name in environment), "0")
    return int(value) if value.isdecimal() else 0


def _need(installed: Callable[[str], bool], package: str, launcher: str) -> None:
    if not installed(package):
        raise UsageError(
            f"started by {launcher}, which JAX asks through the package {package}, and that is not "
            "installed: install it, or set distributed.coordinator, num_processes and process_id "
            "(docs/clusters.md), or distributed.num_processes = 1 where this process is alone"
        )


def this_process(index: int) -> str:
    """How messages name it."""
    import os

    return f"process {index} ({os.getpid()} on {socket.gethostname()})"
