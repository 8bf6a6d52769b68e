"""Uploads an exported folder to the Hugging Face Hub. Nothing else in the package sends anything anywhere."""

from pathlib import Path

from .card import COMMIT, REPO


def push(
    folder: str | Path, repo: str, branch: str | None = None, pull_request: bool = False, private: bool = False
) -> str:
    """Create the repository if it is missing, upload the folder, and write the commit into the card.

    After an interrupted upload call this again: files that the Hub has are not sent twice.

    Args:
        folder: An exported folder.
        repo: OWNER/NAME.
        branch: Branch to upload to, created if it is missing; default main.
        pull_request: Open a pull request instead of committing.
        private: Make a new repository private.

    Returns:
        URL of the commit or pull request.

    Raises:
        ValueError: Both a branch and a pull request were given.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused a request.
    """
    if branch and pull_request:
        raise ValueError(f"a pull request goes to main: leave out the branch {branch!r} or the pull request")
    from huggingface_hub import HfApi

    api, folder = HfApi(), Path(folder)
    api.create_repo(repo, private=private, exist_ok=True)
    if branch:
        api.create_branch(repo, branch=branch, exist_ok=True)
    message = "PT-DiT pipeline with its code"
    done = api.upload_folder(
        repo_id=repo, folder_path=folder, revision=branch, create_pr=pull_request, commit_message=message
    )
    card = (folder / "README.md").read_text(encoding="utf-8").replace(REPO, repo).replace(COMMIT, done.oid)
    api.upload_file(
        repo_id=repo,
        path_or_fileobj=card.encode(),
        path_in_repo="README.md",
        revision=done.pr_revision if pull_request else branch,
        commit_message="Card names the commit to pin",
    )
    return done.pr_url if pull_request else done.commit_url
