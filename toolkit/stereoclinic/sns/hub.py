"""A mask's file on the Hugging Face hub: from there, and to there.

What goes wrong is said in one line, with what to look at; huggingface_hub is imported when it is needed.
"""

from pathlib import Path
from typing import Any, NoReturn

from stereoclinic.errors import InputError


def fetch(repo_id: str, filename: str, **options: Any) -> str:
    """Download a file; options as of `hf_hub_download`.

    Returns:
        Where it is in the cache.

    Raises:
        InputError: There is no such repository or file, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return str(hf_hub_download(repo_id, filename, **options))
    except (OSError, ValueError, EntryNotFoundError) as error:
        _refuse(f"mask {repo_id!r} is no folder, and cannot be had from the hub", error)


def upload(path: Path, repo_id: str, private: bool | None, token: str | bool | None, **options: Any) -> str:
    """Upload a file under its own name, to a repository that is made if need be; options as of `HfApi.upload_file`.

    Returns:
        The commit's address.

    Raises:
        InputError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repo, **options)
    except (OSError, ValueError) as error:
        _refuse(f"mask cannot be pushed to {repo_id!r}", error)
    return str(commit.commit_url)


def _refuse(what: str, error: Exception) -> NoReturn:
    lines = str(error).strip().splitlines()
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    raise InputError(f"{what} ({reason}); check the name, the network and `hf auth login`") from error
