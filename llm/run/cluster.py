"""Whether this process is one of several, and how to find the others: by settings or a launcher.

Without evidence of a second process, this file waits for nothing and asks nobody, so that a laptop
starts at once. JAX itself reads what the launcher has set (`jax._src.clusters`); this file only
decides whether there is something to read. It uses neither JAX nor the network.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llm.config import DistributedConfig
from llm.errors import UsageError

_SLURM = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"}
_KUBERNETES = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"}


class Cluster(NamedTuple):
    """The launcher that knows the processes, and the arguments of `jax.distributed.initialize`.

    Without a coordinator, JAX asks the launcher that cluster_detection_method names, or the first
    launcher that it recognises.
    """

    launcher: str
    arguments: Mapping[str, Any]


def find_cluster(
    settings: DistributedConfig,
    environment: Mapping[str, str],
    installed: Callable[[str], bool] = lambda name: importlib.util.find_spec(name) is not None,
) -> Cluster | None:
    """The processes that this one belongs to; None if it is alone.

    A process with `distributed.num_processes = 1` is alone, whatever a launcher has set.

    Raises:
      UsageError: some of the settings are missing, or JAX needs a package to ask the launcher.
    """
    if settings != DistributedConfig(timeout=settings.timeout):
        return _given(settings)
    platforms = environment.get("JAX_PLATFORMS", "")
    # Importing JAX sets TPU_SKIP_MDS_QUERY if there are no chips.
    on_tpu = (
        (not platforms or "tpu" in platforms.split(","))
        and "TPU_SKIP_MDS_QUERY" not in environment
        and installed("libtpu")
    )
    slurm_tasks = _number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    launchers = [
        # launcher, whether it started more than one process, JAX's name of it, a package JAX needs
        ("SLURM", slurm_tasks > 1 and set(environment) >= _SLURM, "slurm", ""),
        ("Open MPI", _number(environment, "OMPI_COMM_WORLD_SIZE") > 1, None, ""),
        ("MPI", _number(environment, "PMI_SIZE", "PMIX_SIZE") > 1, "mpi4py", "mpi4py"),
        ("the TPU's metadata", on_tpu, None, ""),
        ("Kubernetes", set(environment) >= _KUBERNETES, None, "kubernetes"),
    ]
    for launcher, started, method, package in launchers:
        if started and package and not installed(package):
            raise UsageError(
                f"started by {launcher}, which JAX asks through the package {package}, and that is "
                "not installed: install it, or set distributed.coordinator, num_processes and "
                "process_id (docs/clusters.md), or distributed.num_processes = 1 if this process "
                "is alone"
            )
        if started:
            return Cluster(launcher, {"cluster_detection_method": method})
    return None


def _given(settings: DistributedConfig) -> Cluster | None:
    """The processes that the settings name, if they name all three of them."""
    coordinator, count, index = settings.coordinator, settings.num_processes, settings.process_id
    if count == 1:
        return None
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 <= index < count):
        raise UsageError(
            "distributed: expected coordinator = HOST:PORT of process 0, num_processes = N and "
            f"process_id = 0 to {max(1, count - 1)} together, or none of them (they are then found "
            f"under SLURM, MPI, GKE and on TPUs); found distributed.coordinator = {coordinator!r}, "
            f"distributed.num_processes = {count}, distributed.process_id = {index}"
        )
    return Cluster(
        "distributed.coordinator",
        {
            "coordinator_address": coordinator,
            "num_processes": count,
            "process_id": index,
            "cluster_detection_method": "deactivate",
        },
    )


def _number(environment: Mapping[str, str], *names: str) -> int:
    """The value of the first of these variables that is set; 0 if none is."""
    value = next((environment[name] for name in names if name in environment), "0")
    return int(value) if value.isdecimal() else 0
