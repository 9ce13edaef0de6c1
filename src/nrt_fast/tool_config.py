"""The fields of the commands that help with the others: init, doctor, completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nrt_fast.types import UserError


@dataclass(frozen=True)
class InitConfig:
    """Every field of ``nrt-fast init``."""

    file: str = "run.yaml"
    """File to write; it must be new. On the command line without --file."""

    def check(self) -> None:
        """Any name will do that can be written."""


@dataclass(frozen=True)
class DoctorConfig:
    """Every field of ``nrt-fast doctor``."""

    device: str = "auto"
    """Device of the self-test: cpu, cuda or cuda:N; auto: CUDA where there is one."""

    def check(self) -> None:
        """The command itself looks for the device."""


@dataclass(frozen=True)
class CompletionConfig:
    """Every field of ``nrt-fast completion``."""

    shell: Literal["bash", "zsh", "fish"] | None = None
    """Shell to write a script for; on the command line without --shell."""

    def check(self) -> None:
        """Refuse a script for no shell; UserError says how to name one."""
        if self.shell is None:
            raise UserError("a shell is needed: nrt-fast completion bash, or zsh, or fish")
