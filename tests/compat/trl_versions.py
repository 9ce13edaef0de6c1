"""The TRL adapter in real TRLs: python tests/compat/trl_versions.py [0.24.0 1.0.0 1.9.0 1.16.0].

Each version gets a virtual environment of its own under build/compat, with the transformers of its time. There
tests/test_trl_adapter.py runs (its trainings hold every reward against a naive forward), and, from 1.0, `trl grpo` on
one YAML file whose only line of ours is ``reward_funcs``. The last line of output is one JSON document.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from loads import environment

ROOT = Path(__file__).parents[2]
TRANSFORMERS = {"0.24.0": "4.57.6", "1.0.0": "4.57.6", "1.9.0": "5.16.1", "1.16.0": "5.23.0"}
NEEDED = ["pytest", "peft", "accelerate", "numpy", "safetensors", "datasets", "requests", "rich",
          "jsonargparse[signatures]"]  # fmt: skip
RUN = {
    "model_name_or_path": str(ROOT / "src/nrt_fast/starter/model"),
    "reward_funcs": ["nrt_fast.adapters.trl.nrt_reward"],
    "dataset_name": "data", "output_dir": "out", "use_cpu": True, "bf16": False, "max_steps": 2, "logging_steps": 1,
    "num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 16, "report_to": "none",
}  # fmt: skip


def main() -> int:
    """Number of versions that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=[*TRANSFORMERS], help="all of them, if absent")
    versions = parser.parse_args().versions
    if unknown := set(versions) - set(TRANSFORMERS):
        parser.error(f"{', '.join(sorted(unknown))}: none of them; valid: {' '.join(TRANSFORMERS)}")
    figures = {version: check(version) for version in versions}
    print(json.dumps(figures))
    return sum(not found["passed"] for found in figures.values())


def check(version: str) -> dict[str, object]:
    """What the adapter's tests and the command line say under one TRL."""
    packages = [f"trl=={version}", f"transformers=={TRANSFORMERS[version]}", *NEEDED]
    python = environment(f"trl-{version}", packages)
    tests = run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_trl_adapter.py"], ROOT)
    found = {"passed": tests.returncode == 0, "tests": tests.stdout.strip().splitlines()[-1]}
    if version != "0.24.0":  # it does not tell a reward function its trainer
        rewards = command_line(python)
        found |= {"passed": found["passed"] and len(rewards) == 2, "trl grpo, reward by step": rewards}
    print(f"TRL {version}: {found}", flush=True)
    return found


def command_line(python: Path) -> list[float]:
    """The mean reward of each step of `trl grpo`; nothing where it failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        write = "import json; from nrt_fast.starter import tasks; " + (
            "[print(json.dumps({'prompt': [{'role': 'user', 'content': row['question']}], 'answer': row['answer']})) "
            "for row in tasks.rows('train', 16, seed=0)]"
        )
        (folder / "data/train.jsonl").write_text(run([python, "-c", write], folder).stdout)
        (folder / "run.yaml").write_text(json.dumps(RUN))  # JSON is YAML
        told = run([python.with_name("trl"), "grpo", "--config", "run.yaml"], folder)
    return [float(value) for value in re.findall(r"'rewards/nrt_reward/mean': '?(-?[\d.e-]+)", told.stdout)]


def run(command: list[object], folder: Path) -> subprocess.CompletedProcess:
    """Run a command on this checkout's sources; what it says on stderr is shown."""
    variables = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
