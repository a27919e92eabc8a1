"""A dataset of the Hugging Face hub -> a local directory, whole or not at all.

An interrupted download resumes. A finished one is used as it is, without asking the hub again, so that runs offline and
on other nodes see the same files; delete its directory to download anew.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    XetDownloadError,
)
from huggingface_hub.utils import filter_repo_objects

from vla_ray.data.cast.listing import COMPLETE, SHOWN
from vla_ray.errors import DataError
from vla_ray.storage.files import write_json
from vla_ray.storage.location import Location, storage_errors

logger = logging.getLogger(__name__)

PATTERNS = (
    "*.tar.gz",
    "*.tgz",
    "*.tar",
    "*.tfrecord*",
    "*features.json",
    "*dataset_info.json",
    "*.parquet",
    "*.jsonl",
    "*.arrow",
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(source: str) -> bool:
    """Whether a source is `owner/name` on the hub: it looks like that and is no path here."""
    return _HUB_ID.fullmatch(source) is not None and not Location.of(source).exists()


def download(repo_id: str, cache_dir: Path) -> Path:
    """The directory that holds the data files of a hub dataset, `<cache_dir>/<owner>--<name>`.

    Raises:
        DataError: gated, private or unknown, offline, no network, or a repository without data files.
    """
    target = cache_dir / repo_id.replace("/", "--")
    if (target / COMPLETE).exists():
        logger.info("using the copy of %s in %s", repo_id, target)
        return target
    with storage_errors("download into", Location.of(target)):
        try:
            revision = _download(repo_id, target)
        except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, XetDownloadError) as error:
            raise DataError(f"source={repo_id} cannot be downloaded: {_reason(repo_id, error)}") from error
    write_json(Location.of(target / COMPLETE), {"repo_id": repo_id, "revision": revision})
    return target


def _download(repo_id: str, target: Path) -> str:
    """Fetch what is not there yet of the newest revision, and return which that is."""
    info = huggingface_hub.dataset_info(repo_id)
    held = [file.rfilename for file in info.siblings or ()]
    wanted = list(filter_repo_objects(held, allow_patterns=list(PATTERNS)))
    if not wanted:
        some = ", ".join(held[:SHOWN]) or "no files"
        raise DataError(f"source={repo_id} has no data files ({', '.join(PATTERNS)}); it holds {some}")
    huggingface_hub.snapshot_download(
        repo_id, repo_type="dataset", revision=info.sha, local_dir=target, allow_patterns=list(PATTERNS)
    )
    # Without a network, snapshot_download returns whatever is there, with a warning.
    missing = [name for name in wanted if not (target / name).exists()]
    if missing:
        raise DataError(
            f"source={repo_id}: {len(missing)} of {len(wanted)} files did not arrive, {missing[0]} first; "
            "run the same command again, it goes on where it stopped"
        )
    return str(info.sha)


def _reason(repo_id: str, error: Exception) -> str:
    page = f"https://huggingface.co/datasets/{repo_id}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError) or (status in (401, 403) and not isinstance(error, RepositoryNotFoundError)):
        return f"it is gated. Accept its terms on {page} and set HF_TOKEN to a token of that account"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no path of that name is here, and the hub has no such public dataset ({page}). "
            "Check the spelling; for a private one set HF_TOKEN"
        )
    if isinstance(error, OfflineModeIsEnabled) or (status is None and constants.is_offline_mode()):
        return (
            "HF_HUB_OFFLINE is set, and no path of that name is here. Unset it, or download the files elsewhere and "
            "give their directory as source"
        )
    told = " ".join(str(error).split()) or type(error).__name__
    if status is not None:
        return f"the hub answered {told}. Run the same command again later, it goes on where it stopped"
    return (
        f"the hub cannot be reached ({told}). Check the network and the proxy and run the same command again; it "
        "goes on where it stopped. Or give the directory of a copy as source"
    )
