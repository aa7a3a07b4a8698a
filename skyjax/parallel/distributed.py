"""Makes many processes one program. In: the environment, as a launcher or a cluster sets it. Out: `jax.distributed`.

Looked at in this order, the first that is there decides:
1. SKYJAX_COORDINATOR (HOST:PORT), SKYJAX_PROCESSES, SKYJAX_PROCESS: launch/local.py, or any cluster that jax does not
   know.
2. TPUs of several hosts or slices: on GKE by TPU_WORKER_HOSTNAMES and MEGASCALE_*, on TPU VMs by the metadata server.
3. SLURM, inside `srun`: one process a task, and the GPU of its local rank.
4. Nothing: one process.
"""

import os
from collections.abc import Mapping

import jax

from skyjax.errors import UserError

COORDINATOR, PROCESSES, PROCESS = "SKYJAX_COORDINATOR", "SKYJAX_PROCESSES", "SKYJAX_PROCESS"
# A process that no longer answers is given up after this, and the runtime aborts the others (134).
HEARTBEAT_SECONDS = 40
# Pods of one job start minutes apart, when some nodes have yet to pull the image.
START_SECONDS = 900


def initialise(environment: Mapping[str, str] = os.environ) -> str:
    """Joins this process with its peers, where the environment names any. Call it before the first use of a device.

    Returns:
      What decided: "environment", "tpu", "slurm", or "" for a process of its own.

    Raises:
      UserError: the three variables are incomplete or wrong, or a cluster is announced that jax does not find.
    """
    found = kind(environment)
    # jax chooses the collectives of CPU processes by this; without a cluster it is never looked at.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler of SIGTERM would replace that of train/preemption.py, and ends nothing while the step compiles.
    jax.config.update("jax_enable_preemption_service", False)
    if found == "environment":
        coordinator, processes, process = explicit(environment)
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method="deactivate",  # else a SLURM job's local rank would choose devices
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    elif found:
        try:
            jax.distributed.initialize(
                initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
            )
        except ValueError as error:  # no coordinator: jax did not find the cluster that `kind` saw
            raise UserError(
                f"{found}: the environment speaks of several processes, but jax finds no cluster ({error}); name them"
                f" by {COORDINATOR}, {PROCESSES} and {PROCESS}"
            ) from error
    return found


def kind(environment: Mapping[str, str]) -> str:
    """Who says that there are several processes: "environment", "tpu", "slurm", or "" for nobody.

    Raises:
      UserError: the three variables are incomplete or wrong.
    """
    if any(environment.get(name) for name in (COORDINATOR, PROCESSES, PROCESS)):
        return "environment" if explicit(environment)[1] > 1 else ""
    platforms = environment.get("JAX_PLATFORMS", "")
    if not platforms or "tpu" in platforms:
        hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
        if environment.get("MEGASCALE_COORDINATOR_ADDRESS") or (hosts and "," in hosts):
            return "tpu"
        # jax sets the first where it sees chips and libtpu; the second says that no metadata server knows the hosts.
        if not hosts and environment.get("TPU_ML_PLATFORM") == "JAX" and not environment.get("TPU_SKIP_MDS_QUERY"):
            return "tpu"
    # A batch script itself, outside of srun, has the number of tasks but no list of its step's nodes.
    if environment.get("SLURM_STEP_NODELIST") and int(environment.get("SLURM_NTASKS") or 1) > 1:
        return "slurm"
    return ""


def explicit(environment: Mapping[str, str]) -> tuple[str, int, int]:
    """Coordinator, number of processes and the index of this one, from the three variables.

    Raises:
      UserError: one of them is missing or cannot be.
    """
    missing = [name for name in (COORDINATOR, PROCESSES, PROCESS) if not environment.get(name)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set; {COORDINATOR}=HOST:PORT,"
            f" {PROCESSES}=NUMBER and {PROCESS}=INDEX belong together"
        )
    coordinator = environment[COORDINATOR]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f'{COORDINATOR} is "{coordinator}"; it is HOST:PORT of process 0, as in 10.0.0.2:8476')
    count, index = environment[PROCESSES], environment[PROCESS]
    if not count.isdecimal() or int(count) < 1:
        raise UserError(f'{PROCESSES} is "{count}"; it is the number of processes, 1 or more')
    if not index.isdecimal() or int(index) >= int(count):
        raise UserError(f'{PROCESS} is "{index}"; with {PROCESSES}={count} it is 0 to {int(count) - 1}')
    return coordinator, int(count), int(index)
