"""Checkpoints that are complete or absent, in Hugging Face layout, and the folder of a run.

output_dir/run.json                what the run is: the fields that decide its result
output_dir/checkpoint-<step>/      model or adapter, tokenizer, trainer_state.json, *.safetensors
output_dir/checkpoint-<step>/manifest.json   size and SHA-256 of every file, written last
output_dir/final/                  model or adapter, and tokenizer
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nrt_fast import distributed
from nrt_fast.metrics import fsync, replace_file
from nrt_fast.types import UserError

logger = logging.getLogger(__name__)

MANIFEST, STATE = "manifest.json", "trainer_state.json"
SLICES = "optimizer"  # of each rank that saved: optimizer-00001-of-00002.safetensors; of one alone, without a number
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def claim_folder(output_dir: Path, identity: dict[str, Any]) -> None:
    """Make the folder this run's, or check that it is.

    Raises:
        UserError: it belongs to another run (names the first field that differs), or holds something else.
    """
    path = output_dir / "run.json"
    with told_when_full(path):
        output_dir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(not entry.name.startswith(".") for entry in output_dir.iterdir()):
                raise UserError(f"output_dir {output_dir} is not empty and holds no run; choose an empty or new folder")
            replace_file(path, json.dumps(identity, indent=2) + "\n")
            return
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); choose another output_dir") from error
    different = [key for key in identity if found.get(key) != identity[key]]
    if different:
        key = different[0]
        raise UserError(
            f"output_dir {output_dir} belongs to another run: {key} was {found.get(key)!r} there and is "
            f"{identity[key]!r} now; choose another output_dir, or the fields of that run to go on with it"
        )
    for leftover in output_dir.glob(".*.tmp"):  # of a run that was killed
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def save(
    output_dir: Path,
    step: int,
    save_model: Callable[[Path], None],
    tensors: dict[str, dict[str, Tensor]],
    own: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``checkpoint-<step>`` so that it is there whole or not at all; then drop what is not needed any more.

    The newest ``keep`` up to this step stay. Later ones are incomplete: the run would have gone on from them.
    Every rank calls this. Each writes its slice of the optimizer's state, the first everything else.

    Args:
        save_model: writes model and tokenizer into a folder.
        tensors: further files, by name without suffix.
        own: this rank's slice of flat tensors.
        state: JSON of everything else that a resumed run needs.

    Raises:
        UserError: the disk is full; earlier checkpoints are as they were.
    """
    final = output_dir / f"checkpoint-{step}"
    with atomic_folder(final) as folder:
        parts = distributed.on_all(lambda: _write_own(folder, own), "the checkpoint's slices")
        described = {name: description for part in parts for name, description in part.items()}
        distributed.on_first(_write_rest, folder, save_model, tensors, state, described)
    distributed.on_first(_drop_old, output_dir, step, keep)
    return final


def _write_own(folder: Path, own: dict[str, Tensor]) -> dict[str, dict[str, int | str]]:
    """This rank's file, on the disk; its name and description."""
    count = f"-{distributed.rank() + 1:05}-of-{distributed.size():05}" if distributed.size() > 1 else ""
    path = folder / f"{SLICES}{count}.safetensors"
    _write(own, path)
    fsync(path)
    return {path.name: describe(path)}


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _write_rest(
    folder: Path, save_model: Callable[[Path], None], tensors: dict[str, dict[str, Tensor]], state: dict[str, Any],
    described: dict[str, dict[str, int | str]],
) -> None:  # fmt: skip
    save_model(folder)
    for name, group in tensors.items():
        _write(group, folder / f"{name}.safetensors")
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")
    # A file of another host need not show in the folder here yet, but it is described.
    rest = {path.name: describe(path) for path in folder.iterdir() if path.name not in described}
    manifest = dict(sorted((described | rest).items()))
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _drop_old(output_dir: Path, step: int, keep: int) -> None:
    numbered = _numbered(output_dir)
    kept = [path for number, path in numbered if number <= step][-keep:]
    for _, path in numbered:
        if path not in kept:
            _remove(path)


def new_folder(name: str) -> Path:
    """The absolute path of an output_dir that is to be made; UserError if something is there."""
    path = Path(name).expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"output_dir {path} is there and not empty; choose an empty or new folder")
    return path


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A folder to fill that gets its name only when everything in it is on the disk; replaces one of that name."""
    folder = final.with_name(f".{final.name}.tmp")
    with told_when_full(final):
        try:
            distributed.on_first(_make_anew, folder)
            yield folder
            distributed.on_first(_publish, folder, final)
        except BaseException:
            if distributed.is_first():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(folder: Path, final: Path) -> None:
    for path in folder.iterdir():
        fsync(path)
    fsync(folder)
    _remove(final)
    folder.rename(final)
    fsync(final.parent)


@contextmanager
def told_when_full(path: Path) -> Iterator[None]:
    """Turn a write that the disk refused into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(_refused(path, error)) from error
    except Exception as error:
        # safetensors wraps the operating system's error in its own.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise UserError(_refused(path, OSError(int(number[1]), os.strerror(int(number[1]))))) from error


def _refused(path: Path, error: OSError) -> str:
    reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
    return f"cannot write {path}: {reason}; what was saved before is complete"


def to_resume(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint that a run goes on from, or None for a fresh start.

    Args:
        wanted: auto, false, or the path of a checkpoint, which is where the run starts: given again, it goes on from
            its own newest checkpoint, if that is a later one.

    Raises:
        UserError: false where there is a checkpoint, or a path that is not that of a complete one.
    """
    found = newest(output_dir)
    if wanted not in ("auto", "false"):
        wrong = problem(Path(wanted))
        if wrong is not None:
            raise UserError(f"resume_from_checkpoint {wanted}: {wrong}; valid: auto, false, a complete checkpoint")
        if found is None or _step_of(found) <= _step_of(Path(wanted)):
            return Path(wanted)
        logger.warning("%s is passed over: %s is later; another output_dir starts from it again", wanted, found)
        return found
    if found is not None and wanted == "false":
        raise UserError(
            f"resume_from_checkpoint is false, but {output_dir} holds {found.name}; "
            "choose another output_dir or resume_from_checkpoint auto"
        )
    return found


def _step_of(folder: Path) -> int:
    return json.loads((folder / STATE).read_text())["progress"]["step"]


def newest(output_dir: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    for _, path in reversed(_numbered(output_dir)):
        wrong = problem(path)
        if wrong is None:
            return path
        logger.warning("%s is passed over: %s", path, wrong)
    return None


def problem(folder: Path) -> str | None:
    """Why a checkpoint is not complete, or None: every file of its manifest has its size and SHA-256."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if describe(path) != expected:
            return f"{name} is not what {MANIFEST} says"
    return None


def load(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """(state, tensors by file name) of a complete checkpoint, without model and slices."""
    others = ("model", "adapter_model", SLICES)
    files = [path for path in folder.glob("*.safetensors") if not path.name.startswith(others)]
    return json.loads((folder / STATE).read_text()), {path.stem: load_file(path) for path in files}


def load_slices(folder: Path, ranges: dict[str, slice]) -> dict[str, Tensor]:
    """Parts of the flat tensors that any number of ranks has saved, slice behind slice; without absent names.

    Raises:
        UserError: a file cannot be read, or is not as long as it says.
    """
    parts: dict[str, list[Tensor]] = {}
    offsets = dict.fromkeys(ranges, 0)
    for path in sorted(folder.glob(f"{SLICES}*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in ranges.keys() & set(file.keys()):
                    found, wanted, offset = file.get_slice(name), ranges[name], offsets[name]
                    (length,) = found.get_shape()
                    parts.setdefault(name, []).append(
                        found[max(0, wanted.start - offset) : max(0, min(length, wanted.stop - offset))]
                    )
                    offsets[name] += length
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    return {name: torch.cat(pieces) for name, pieces in parts.items()}


def save_tokenizer(tokenizer, source: Path, grown: bool, folder: Path) -> None:
    """Copy the source's tokenizer files byte by byte; only a tokenizer that got a token is written anew."""
    if grown:
        tokenizer.save_pretrained(folder)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def describe(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    steps = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*"))
    return sorted((int(match[1]), path) for match, path in steps if match)


def _remove(folder: Path) -> None:
    """Delete a folder that may not be there. It loses its name first: a crash leaves no half of it under that name."""
    if folder.exists():
        unnamed = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(unnamed, ignore_errors=True)
        folder.rename(unnamed)
        shutil.rmtree(unnamed)
