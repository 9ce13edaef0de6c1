"""The architecture, checked by machine: who may import whom, what importing costs, how long files and functions are."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src/nrt_fast"
KERNELS = ROOT / "triton_kernels"
ROOMS = (  # an import goes to a lower rank only; rooms of one rank never import one another
    {"types", "reference", "backward", "fakes", "signals", "arena", "heap", "health", "watch"},
    {"arguments", "config_checks", "distributed", "grading", "metrics", "ops", "triton_kernels", "starter"},
    {"config", "kv_cache", "optim", "packed_attention", "tool_config"},
    {"data", "hub", "model", "plan", "resolve", "shell_completion", "streams", "trackers"},
    {"decode", "communication"},
    {"rollout", "score", "rewards", "pack", "train_step", "checkpoint", "evaluate"},
    {"engine", "completions", "diagnostics", "json_lines", "report", "html_report", "score_report"},
    {"source", "eval_report", "model_card", "shares"},
    {"run", "heldout", "launch"},
    {
        "loop",
        "score_command",
        "eval_command",
        "generate_command",
        "export_command",
        "report_command",
        "init_command",
        "adapters",
    },
    {"doctor"},
    {"cli"},
    {"__main__"},
)
RANKS = {room: rank for rank, rooms in enumerate(ROOMS) for room in rooms}
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80


def python_files(folder):
    return [path for path in sorted(folder.rglob("*.py")) if "__pycache__" not in path.parts]


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported_modules(path):
    """Dotted names that the file imports anywhere, except for annotations only."""
    pending, modules = [ast.parse(path.read_text(encoding="utf-8"))], []
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
        if not is_type_checking(node):
            pending += ast.iter_child_nodes(node)
    return modules


def imported_rooms(path):
    names = [module.split(".") for module in imported_modules(path)]
    return {parts[1] for parts in names if parts[0] == "nrt_fast" and len(parts) > 1 and parts[1] in RANKS}


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_to_lower_ranks(path):
    room = room_of(path)
    if room == "__init__":
        assert not imported_rooms(path), "the package itself imports its rooms when they are asked for"
        return
    assert room in RANKS, f"{room} is a new room: give it a rank, here and in docs"
    for other in imported_rooms(path) - {room}:
        assert RANKS[other] < RANKS[room], f"{room} (rank {RANKS[room]}) imports {other} (rank {RANKS[other]})"


@pytest.mark.parametrize("path", python_files(KERNELS), ids=lambda path: path.name)
def test_kernels_import_torch_and_triton_only(path):
    modules = [module for module in imported_modules(path) if not module.startswith("nrt_fast.triton_kernels.")]
    outside = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    assert outside <= {"torch", "triton"}


def test_kernels_refuse_another_name():
    """Triton's own package is called triton_kernels: with our root on sys.path, ours must not stand in for it."""
    spec = importlib.util.spec_from_file_location("triton_kernels", KERNELS / "__init__.py")
    with pytest.raises(ImportError, match=r"nrt_fast\.triton_kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("nrt_fast", ["torch", "triton", "numpy", "transformers"]), ("nrt_fast.cli", ["torch", "triton", "transformers"])],
)
def test_import_is_light(module, heavy):
    result = run(f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_ops_need_neither_the_extension_nor_triton():
    result = run(
        "import logging, sys; sys.modules['triton'] = None\n"
        "logging.basicConfig()\n"
        "from nrt_fast import ops\n"
        "ops._load_extension = lambda: (_ for _ in ()).throw(ImportError('not built'))\n"
        "import torch\n"
        "print(ops.backend()['pack_bins/cpu'], ops.pack_bins(torch.tensor([4, 7]), 10).tolist())\n"
        "assert ops.missing('triton')"
    )
    assert result.stdout.strip() == "reference [1, 0]", result.stderr
    assert result.stderr.count("no native ops, the PyTorch reference replaces them: not built") == 1


@pytest.mark.parametrize("path", [*python_files(PACKAGE), *python_files(KERNELS)], ids=lambda path: path.name)
def test_files_and_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
