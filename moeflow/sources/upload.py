"""A folder uploaded to the Hugging Face hub, as one commit of a model repository."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from moeflow.sources.hub import endpoint
from moeflow.store.errors import StoreError


def upload(folder: Path, repo: str, *, private: bool | None = None, message: str = "", token: str | None = None) -> str:
    """Upload the files of a folder to `org/name`, which is made if it does not exist; return the commit's address.

    Files that the repository has and the folder lacks stay. Raises StoreError, in one line, if the hub refuses or does not answer.
    """
    hub = HfApi(endpoint=endpoint(), token=token)
    try:
        hub.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        made = hub.upload_folder(repo_id=repo, repo_type="model", folder_path=folder, commit_message=message or None)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no name of a repository ({error}); write org/name") from error
    except (HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404) or status is None:
            raise StoreError(
                f"the hub does not let this user write to {repo} ({_line(error)}); log in with a token that may: hf auth login, "
                "or HF_TOKEN"
            ) from error
        raise StoreError(f"the hub refuses {repo}: {_line(error)}") from error
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise StoreError(f"the hub does not answer, so {repo} is not uploaded: {_line(error)}; try again") from error
    return str(made.commit_url)


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
