"""Several processes of one machine, started by torchrun's own launcher."""

from __future__ import annotations

import os
import sys
import uuid

SHUTDOWN_S = 600  # after a signal, for the step that runs and its checkpoint


def launch(argv: list[str], num_processes: int) -> int:
    """Run the command in so many processes; returns its exit code, 2 if one failed, 128 + n after signal n."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_S))
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=num_processes, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "nrt_fast", *argv)
    except ChildFailedError as error:  # each process has told why
        codes = {failure.exitcode for failure in error.failures.values()}
        return codes.pop() if len(codes) == 1 and min(codes) > 0 else 2
    except SignalException as error:
        return 128 + error.sigval
    return 0
