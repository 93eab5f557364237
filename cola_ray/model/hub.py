"""Checks whether a hub id is available, in the local cache or on the hub, with a short timeout.

Hugging Face's own variables apply: HF_HUB_OFFLINE (HF_DATASETS_OFFLINE, TRANSFORMERS_OFFLINE), HF_ENDPOINT, HF_TOKEN.
"""

import functools
import os
import re
from pathlib import Path
from typing import Literal

Kind = Literal["model", "dataset"]
_TIMEOUT_S = 5.0
_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


@functools.cache
def fault(name: str, kind: Kind) -> str:
    """Why a hub id is not available, as ``why; fix``; empty if it is. The result is cached for the process."""
    if not _ID.fullmatch(name):
        return "neither an existing path nor a hub id; give a path or org/name"
    if cached(name, kind):
        return ""
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE" if kind == "dataset" else "TRANSFORMERS_OFFLINE")
    switch = next((one for one in offline if os.environ.get(one, "").upper() in ("1", "ON", "YES", "TRUE")), "")
    if switch:
        return f"not in the local cache, and {switch} is set; give a path, or download it once without {switch}"
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    api = HfApi()
    try:
        found = (api.model_info if kind == "model" else api.dataset_info)(name, timeout=_TIMEOUT_S)
        if found.gated:
            api.auth_check(name, repo_type=kind)
    except GatedRepoError:
        return "gated on the hub; accept its terms there and set HF_TOKEN, or give a path"
    except RepositoryNotFoundError:
        return f"no such path here, and no such {kind} on the hub; give a path, or set HF_TOKEN if it is private"
    except Exception as error:  # connection errors come from several libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"no such path here, and the hub cannot be reached ({reason}); give a path, or check the connection"
    return ""


def cached(name: str, kind: Kind) -> Path | None:
    """The folder in the local cache that holds a hub id; None if it is not cached."""
    if not _ID.fullmatch(name):
        return None
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    if kind == "model":
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(name, "config.json")
        return Path(config).parent if isinstance(config, str) else None
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME) / "datasets")) / name.replace("/", "___").lower()
    fetched = Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "snapshots"
    return next((folder for folder in (prepared, fetched) if folder.is_dir()), None)
