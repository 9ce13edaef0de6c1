"""What a process frees and asks for again, in page faults."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from nrt_fast.heap import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if "keep" in sys.argv:
    assert keep_freed_memory()
for _ in range(16):  # remainders of aligned blocks part the first ones from their neighbours
    torch.ones(2**24)
before = faults()
for _ in range(4):
    torch.ones(2**24)
print(faults() - before)
"""


def faults(*argv):
    command = [sys.executable, "-c", SCRIPT, *argv]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is told to keep its memory")
def test_memory_that_was_freed_is_there_again():
    assert 10 * faults("keep") < faults()
