"""Find timm's pretrained weights in the caches, or download them if their host answers."""

from __future__ import annotations

import os
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch

_PROBE_SECONDS = 5.0
# timm prefers the safetensors twin of each of these.
_TWINS = {"pytorch_model.bin": "model.safetensors", "open_clip_pytorch_model.bin": "open_clip_model.safetensors"}


def find_pretrained(name: str) -> Path:
    """Local file with the pretrained weights of timm model ``name``, downloaded if necessary.

    Both caches (hub and ``torch.hub``) are read without using the network. Before a download the host is probed once,
    because the hub's client retries an unreachable host for about half a minute.

    Raises:
        LookupError: naming the file and the cache, if the weights are not cached and cannot be downloaded.
    """
    if name.endswith(".dino"):
        # By timm's rule for names, without the seconds that importing it takes.
        return _from_hub(f"timm/{name}", None)
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        raise LookupError(f"timm publishes none for the architecture {name}")
    return _from_hub(config.hf_hub_id, config.hf_hub_filename) if config.hf_hub_id else _from_url(config.url)


def _from_hub(identifier: str, filename: str | None) -> Path:
    from huggingface_hub import constants, hf_hub_download

    repository, _, revision = identifier.partition("@")
    name = filename or "pytorch_model.bin"
    names = [_TWINS[name], name] if name in _TWINS else [name]
    for candidate in names:
        cached = _cached(repository, candidate, revision or None)
        if cached is not None:
            return Path(cached)
    looked_for = f"{names[0]} of {repository} is not in the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        raise LookupError(f"{looked_for}, and HF_HUB_OFFLINE forbids the download")
    reason = _unreachable(constants.ENDPOINT)
    if reason is not None:
        raise LookupError(f"{looked_for}, and {constants.ENDPOINT} cannot be reached ({reason})")
    error: Exception | None = None
    for candidate in names:
        try:
            return Path(hf_hub_download(repository, candidate, revision=revision or None))
        except Exception as problem:
            error = problem
    raise LookupError(f"{looked_for}, and the download failed ({error})") from error


def _cached(repository: str, name: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, name, revision=revision)
    # A sentinel object marks a file that is known not to exist.
    return found if isinstance(found, str) else None


def _from_url(url: str) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / os.path.basename(url)
    if file.is_file():
        return file
    looked_for = f"{file.name} is not in the cache {folder}"
    reason = _unreachable(url)
    if reason is not None:
        raise LookupError(f"{looked_for}, and {url} cannot be reached ({reason})")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), progress=False)
    except Exception as error:
        raise LookupError(f"{looked_for}, and the download of {url} failed ({error})") from error
    return file


def _unreachable(url: str) -> str | None:
    """Why ``url`` does not answer, or None; an error page is an answer. Uses the environment's proxies."""
    answer: list[str | None] = []
    # In a separate thread, because the request's timeout does not limit the host name look-up.
    worker = threading.Thread(target=lambda: answer.append(_probe(url)), daemon=True)
    worker.start()
    worker.join(2 * _PROBE_SECONDS)
    return answer[0] if answer else f"no answer within {2 * _PROBE_SECONDS:g} s"


def _probe(url: str) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except urllib.error.URLError as error:
        # The host answered; certificates may be configured only for the real client.
        return None if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except OSError as error:
        return str(error) or type(error).__name__
    return None
