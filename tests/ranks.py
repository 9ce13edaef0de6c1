"""Ranks of one run as processes that are forked from one which has imported everything."""

import multiprocessing
import os
import socket
import sys
import time
from functools import cache
from pathlib import Path

from nrt_fast import distributed, loop
from nrt_fast.types import UserError

PRELOADED = [
    "ranks", "nrt_fast.loop", "pandas", "pyarrow.parquet", "transformers.models.llama.configuration_llama",
    "transformers.convert_slow_tokenizer", "transformers.tokenization_utils_tokenizers",
]  # fmt: skip


@cache
def context():
    """The server that forks; a fork costs nothing beside an import of torch."""
    started = multiprocessing.get_context("forkserver")
    started.set_forkserver_preload(PRELOADED)
    return started


class Ranks:
    """Processes that have joined, each calls ``work(*arguments)``; what rank n prints as errors is in ``folder/n``."""

    def __init__(self, size, folder, work, *arguments, timeout_s=60):
        folder.mkdir(parents=True)
        self.folder, self.processes = folder, []
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        for rank in range(size):
            process = context().Process(target=_run, args=(rank, size, port, folder, timeout_s, work, arguments))
            process.start()
            self.processes.append(process)

    def join(self, timeout=120):
        """Exit codes of all."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def errors(self):
        """What each has printed as its error."""
        return [(self.folder / str(rank)).read_text() for rank in range(len(self.processes))]


def _run(rank, size, port, folder, timeout_s, work, arguments):
    errors = os.open(folder / str(rank), os.O_CREAT | os.O_WRONLY)
    os.dup2(errors, 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        with distributed.joined(timeout_s, "cpu"):
            work(*arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def together(size, folder, work, *arguments):
    """Let ranks work to their end, and require that all of them come to it."""
    ranks = Ranks(size, folder, work, *arguments)
    codes = ranks.join()
    assert codes == [0] * size, "\n".join(ranks.errors())


def train_and_do(config, step, rank, act):
    """Train; one rank does something in one step, between its rollout and what it learns."""
    learn, count = loop.learn, 0

    def acting(*arguments):
        nonlocal count
        count += 1
        if distributed.rank() == rank and count == step:
            act()
        return learn(*arguments)

    loop.learn = acting
    loop.train(config)


def train_timed(config, folder: Path):
    """Train; writes the processor seconds of this rank's steps, without the first."""
    step, seconds = loop.step, []

    def timed(*arguments):
        started = time.process_time()
        row = step(*arguments)
        seconds.append(time.process_time() - started)
        return row

    loop.step = timed
    loop.train(config)
    (folder / f"{distributed.rank()}.seconds").write_text(str(sum(seconds[1:]) / len(seconds[1:])))
