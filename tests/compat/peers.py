"""Checks the adapters against the trainers themselves: python tests/compat/peers.py [verl openrlhf swift prime_rl].

Each trainer is installed at the version below into build/compat, without what needs a GPU, and its checks run there.
prime-rl is on no index: --prime_rl names a checkout of it with the submodule deps/verifiers, and runs on Python 3.12.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from loads import environment

ROOT = Path(__file__).parents[2]
BASE = ["numpy", "safetensors", "pytest", "transformers==5.9.0", "jsonargparse[signatures]", "rich"]
PEERS = {
    "verl": ("verl==0.9.1", [
        "tensordict==0.10.0", "hydra-core", "ray==2.55.0", "codetiming", "pandas", "peft", "accelerate", "torchdata",
        "pylatexenc", "cachetools", "datasets", "pillow", "uvicorn", "fastapi", "msgspec",
    ]),
    "openrlhf": ("openrlhf==0.11.2", ["ray==2.55.0", "aiohttp", "datasets", "tqdm", "pylatexenc", "sympy"]),
    "swift": ("ms-swift==4.6.0", [
        "modelscope", "addict", "dacite", "einops", "json-repair", "tiktoken", "nltk", "binpacking", "simplejson",
        "sortedcontainers", "zstandard", "openai", "scipy", "sentencepiece", "attrdict", "datasets<4.8.5", "peft<0.21",
        "accelerate", "trl<1.0", "pandas", "pillow", "uvicorn", "fastapi", "msgspec", "tensorboard", "matplotlib",
    ]),
    "prime_rl": (None, [
        "jaxtyping", "beartype", "prime-pydantic-config", "verifiers", "renderers", "loguru", "tomli", "tomli-w",
        "openai", "tenacity", "httpx", "datasets", "pyzmq", "msgspec", "pyarrow", "wandb", "setproctitle",
    ]),
}  # fmt: skip


def main() -> int:
    """Number of trainers whose checks failed, or could not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", help="all that can run, if absent")
    parser.add_argument("--prime_rl", type=Path, help="a checkout of prime-rl")
    options = parser.parse_args()
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"{', '.join(sorted(unknown))}: none of them; valid: {' '.join(PEERS)}")
    chosen = options.peers or [name for name in PEERS if name != "prime_rl" or options.prime_rl]
    if "prime_rl" in chosen and not options.prime_rl:
        parser.error("prime_rl needs --prime_rl CHECKOUT")
    failed = [name for name in chosen if not check(name, options.prime_rl)]
    for name in PEERS:
        print(f"{name}: {'failed' if name in failed else 'passed' if name in chosen else 'not checked'}")
    return len(failed)


def check(name: str, checkout: Path | None) -> bool:
    """Install a trainer where it is not yet, and run its checks."""
    package, needs = PEERS[name]
    python = environment(name, [*BASE, *needs], alone=package)
    sources = [ROOT / "src"]
    if name == "prime_rl":
        folders = ("src", "packages/prime-rl-configs/src", "deps/verifiers")
        sources += [checkout.resolve() / folder for folder in folders]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sources))}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/compat/{name}_checks.py"]
    return subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
