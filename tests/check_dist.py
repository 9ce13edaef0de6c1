"""Install the wheel of ``make dist`` where nothing can be compiled, and use it: ``python tests/check_dist.py dist``.

The fresh environment sees this one's torch and other packages, but not this one's nrt-fast.
"""

import os
import subprocess
import sys
import tempfile
import venv
from importlib.util import find_spec
from pathlib import Path

USE = """
import sys, torch, nrt_fast
from nrt_fast import ops
assert nrt_fast.__file__.startswith(sys.prefix), nrt_fast.__file__
assert ops.backend()["pack_bins/cpu"] == "native", ops.missing("native")
assert ops.pack_bins(torch.tensor([4, 7]), 10).tolist() == [1, 0]
import nrt_fast.triton_kernels
print(nrt_fast.__version__)
"""


def run(*command: str | Path, **environment: str) -> str:
    """What a command prints; an error where it fails."""
    result = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return result.stdout.strip()


def main(folder: Path) -> None:
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    version = sdist.name.removeprefix("nrt_fast-").removesuffix(".tar.gz")
    assert wheel.name.startswith(f"nrt_fast-{version}-cp311-abi3-"), wheel.name
    with tempfile.TemporaryDirectory() as fresh:
        venv.create(fresh, with_pip=True)
        bin_folder, (site_packages,) = Path(fresh, "bin"), Path(fresh).glob("lib/python*/site-packages")
        install = (bin_folder / "pip", "install", "--quiet", "--no-index", "--no-deps")
        run(*install, wheel, CC="/bin/false", CXX="/bin/false")
        (site_packages / "others.pth").write_text(str(Path(find_spec("torch").origin).parents[1]))
        assert run(bin_folder / "python", "-c", USE, PYTHONPATH="") == version
        assert run(bin_folder / "nrt-fast", "--version", PYTHONPATH="") == f"nrt-fast {version}"
    print(f"{wheel.name} ({wheel.stat().st_size / 2**20:.1f} MiB) installs without a compiler and runs its ops")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
