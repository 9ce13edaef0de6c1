"""The Hugging Face Hub: a finished folder is uploaded where push_to_hub asks for it, and only there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nrt_fast.config import HubFields
from nrt_fast.types import UserError


def check_account(config: HubFields) -> None:
    """Ask the hub who we are, before anything is spent on a model that could not be uploaded.

    Raises:
        UserError: nobody, or the hub cannot be reached.
    """
    if not config.push_to_hub:
        return
    from huggingface_hub import HfApi

    with _told("push_to_hub needs an account that may write; hf auth login, or leave it out"):
        HfApi().whoami()


def upload(folder: Path, config: HubFields) -> str:
    """Upload the files of a folder in one commit, to a repository that is made if it is not there; returns its URL.

    Raises:
        UserError: the hub refused, or cannot be reached; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api, name = HfApi(), config.hub_model_id or Path(config.output_dir).name
    with _told(f"{folder} is complete, but could not be uploaded to {name}; hf upload {name} {folder} tries again"):
        url = api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="A model trained with nrt-fast")
    return str(url)


@contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the network, the token, the name or the hub: each has classes of its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{what} ({reason})") from error
