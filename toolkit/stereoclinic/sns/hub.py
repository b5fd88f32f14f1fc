"""A mask's file on the Hugging Face hub: from there, and to there.

What goes wrong is said in one line, with what to look at; huggingface_hub is imported when it is needed.
"""

from pathlib import Path
from typing import NoReturn

from stereoclinic.errors import InputError


def fetch(
    repo_id: str,
    filename: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> str:
    """Download a file; arguments as of `NeuronMask.from_pretrained`.

    Returns:
        Where it is in the cache.

    Raises:
        InputError: There is no such repository or file, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(
            repo_id,
            filename,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
    except (OSError, ValueError, EntryNotFoundError) as error:
        _refuse(f"mask {repo_id!r} is no folder, and cannot be had from the hub", error)


def upload(
    path: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a file under its own name; arguments as of `NeuronMask.push_to_hub`.

    Returns:
        The commit's address.

    Raises:
        InputError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_file(
            path_or_fileobj=path,
            path_in_repo=path.name,
            repo_id=repo,
            revision=revision,
            commit_message=commit_message or f"Upload {path.name}",
            create_pr=create_pr,
        )
    except (OSError, ValueError) as error:
        _refuse(f"mask cannot be pushed to {repo_id!r}", error)
    return str(commit.commit_url)


def _refuse(what: str, error: Exception) -> NoReturn:
    lines = str(error).strip().splitlines()
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    raise InputError(f"{what} ({reason}); check the name, the network and `hf auth login`") from error
