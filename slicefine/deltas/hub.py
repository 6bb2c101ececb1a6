"""The Hugging Face hub: push a delta, pull one. Imported only when asked for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

try:
    import huggingface_hub
except ImportError as error:
    raise ImportError(
        "the hub needs huggingface_hub: pip install 'slicefine[hf]'"
    ) from error

from slicefine.deltas.delta import CONFIG_FILE, FILE


def push(
    model: Any,
    repo_id: str,
    *,
    commit_message: str = "Upload slicefine delta",
    token: str | None = None,
    **kwargs: Any,
) -> str:
    """Create the repository if need be and upload what ``model.save_pretrained`` writes. kwargs:
    `HfApi.create_repo`'s.
    """
    api = huggingface_hub.HfApi(token=token)
    created = api.create_repo(repo_id, exist_ok=True, **kwargs)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        done = api.upload_folder(
            repo_id=created.repo_id, folder_path=folder, commit_message=commit_message
        )
    return str(done)


def pull(repo_id: str) -> Path:
    """The folder of a delta on the hub, downloaded into the hub's cache."""
    # a repository may hold a whole model too, which is not fetched for a delta
    return Path(
        huggingface_hub.snapshot_download(
            repo_id, allow_patterns=[FILE, CONFIG_FILE, "README.md"]
        )
    )
