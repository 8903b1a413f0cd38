"""Upload exports to the Hugging Face hub, and download adapters from it."""

from __future__ import annotations

from pathlib import Path

from dylora_mlx.errors import UserError


def upload_files(folder: Path) -> list[tuple[str, int]]:
    """List the files that an upload would send: (relative path, bytes)."""
    return [(p.relative_to(folder).as_posix(), p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file()]


def push_to_hub(folder: Path, repository: str, public: bool) -> str:
    """Upload a folder and return the repository's URL. Creates the repository if needed, private unless `public`.

    Raises UserError without a login or write access, for an invalid repository name, or without a connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(library_name="dylora_mlx")
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload an export of dylora_mlx")
    except LocalTokenNotFoundError as error:
        raise UserError(f"--push {repository}: no login on this machine; run `hf auth login`") from error
    except HFValidationError as error:
        raise UserError(f"--push {repository}: not a repository name; give USER/NAME") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"--push {repository}: the hub refuses ({status}); log in with a token that may write there, `hf auth login`"
            ) from error
        raise UserError(f"--push {repository}: the hub answers {status or 'with an error'}; try again later") from error
    except Exception as error:  # connection, proxy, timeout: many exception types, one remedy
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"--push {repository}: the hub cannot be reached ({reason}); {folder} is kept") from error
    return f"https://huggingface.co/{repository}"


def locate_adapter(name: str) -> Path:
    """Return the local folder of an adapter, given its path or hub id.

    Downloads a hub id, JSON and safetensors files only. Raises UserError if it cannot be downloaded. A path is returned
    unchecked.
    """
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{name}: no such folder here, nor on the hub, or no access; log in with `hf auth login`"
        ) from error
    except Exception as error:  # connection, proxy, disk: many exception types, one remedy
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{name}: no such folder here, and it cannot be downloaded ({reason})") from error
