"""Files of pretrained weights: where they lie, how they are fetched, checked and read.

The disk comes first. A machine without a network gets one paragraph at once that says what is missing
and where it may be put, not a minute of retries. Nothing is unpickled: checkpoints are read with
`weights_only=True`.
"""

import hashlib
import os
import re
import shutil
import socket
from collections.abc import Mapping
from functools import partial
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError  # the name of a fault; nothing is unpickled
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, urlopen

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from finetune.config.backbone_names import zoo_folders
from finetune.config.card import Card
from finetune.errors import BackboneError
from finetune.runs.folder import write_whole

CONNECT_SECONDS = 5
"""How long a server may take to answer before we call it out of reach."""
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def read_card_weights(card: Card, zoo: Mapping[str, Card]) -> dict[str, torch.Tensor]:
    """The tensors of the safetensors file beside a card, its hash checked first; half precision becomes float32."""
    path = card.weights
    assert path is not None
    if not path.is_file():
        others = {name: other for name, other in zoo.items() if name != card.name}
        raise missing_weights(card.name, path.name, path.parent, "the card is there, its weights are not", others)
    if card.sha256:
        check_sha256(path, card.sha256)
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as fault:
        raise BackboneError(f"{path} is not a readable safetensors file ({fault}). Fetch it again.") from fault
    return {name: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for name, t in state.items()}


_MEND_CARD = "Mend arch, arch_kwargs or num_classes of the card, or use the file it was written for."


def load_strictly(
    model: nn.Module, state: Mapping[str, torch.Tensor], file: str, arch: str, *, do: str = _MEND_CARD
) -> None:
    """Copy `state` into `model`; every key and shape must match, or the message says what to `do`.

    Raises:
        BackboneError: naming the file, the architecture and the first differences.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as fault:
        detail = " ".join(str(fault).split())
        raise BackboneError(
            f"{file} does not fit {arch}: {detail[:400]}{'…' if len(detail) > 400 else ''} {do}"
        ) from fault


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torch checkpoint that holds nothing else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, UnpicklingError) as fault:
        first = str(fault).partition(". ")[0]
        raise BackboneError(f"{path} is not a readable checkpoint ({first}). Delete it and fetch it again.") from fault


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose sha256 does not begin with `expected` (hexadecimal)."""
    with path.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if not got.startswith(expected.lower()):
        raise BackboneError(f"{path} is not the file it should be: sha256 expected {expected}, got {got}. "
                            "It is damaged or of another version; fetch it again.")  # fmt: skip


def fetch_from_hub(name: str, contract: Any, zoo: Mapping[str, Card]) -> Path:
    """The weights file of a Hugging Face repository: from the cache, else from the network."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo = contract.hf_hub_id
    files = [contract.hf_hub_filename] if contract.hf_hub_filename else _HUB_FILES
    for file in files:
        if isinstance(found := try_to_load_from_cache(repo, file, cache_dir=constants.HF_HUB_CACHE), str):
            return Path(found)
    why = _why_offline(constants.ENDPOINT)
    for file in files if not why else ():
        try:
            return Path(hf_hub_download(repo, file, etag_timeout=CONNECT_SECONDS))
        except LocalEntryNotFoundError as fault:  # the network failed
            why = str(fault)
            break
        except EntryNotFoundError:  # the repository has no such file; the next name may do
            why = f"the repository has none of {', '.join(files)}"
        except OSError as fault:
            why = str(fault)
            break
    raise missing_weights(name, f"{files[0]} of {constants.ENDPOINT}/{repo}", None, why, zoo)


def fetch_from_url(name: str, url: str, zoo: Mapping[str, Card]) -> Path:
    """A file of torch's checkpoint folder, downloaded where it is not there yet; its hash is checked."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / Path(urlsplit(url).path).name
    if not path.is_file():
        if why := _why_offline(url):
            raise missing_weights(name, path.name, folder, why, zoo)
        try:
            write_whole(path, partial(_download, url))
        except (OSError, HTTPException) as fault:
            why = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
            raise missing_weights(name, path.name, folder, why, zoo) from fault
    if found := re.search(r"-([0-9a-f]{8,})\.", path.name):
        check_sha256(path, found[1])
    return path


def _download(url: str, path: Path) -> None:
    """Fetch a file; unlike torch's own way, a server that falls silent is waited for a few seconds only.

    Raises:
        OSError: if it cannot be had whole.
    """
    with urlopen(url, timeout=CONNECT_SECONDS) as answer, path.open("wb") as file:
        shutil.copyfileobj(answer, file)
        wanted, got = answer.headers.get("Content-Length"), file.tell()
    if wanted is not None and got != int(wanted):
        raise OSError(f"{url} broke off after {got:,} of {int(wanted):,} bytes")


def _why_offline(url: str) -> str:
    """Why nothing can be fetched from `url`, or an empty string. One short attempt to connect, no retries."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE forbids to fetch it"
    scheme = urlsplit(url).scheme
    target = urlsplit(getproxies().get(scheme, url))
    try:
        socket.create_connection((target.hostname, target.port or 443), timeout=CONNECT_SECONDS).close()
    except OSError as fault:
        return f"{target.hostname} cannot be reached ({fault})"
    return ""


def missing_weights(name: str, file: str, folder: Path | None, why: str, zoo: Mapping[str, Card]) -> BackboneError:
    """One paragraph: what is missing, why it could not be fetched, where it may be put, what else is at hand."""
    place = f"Put it into {folder}" if folder else f"Put it with a card.yaml into a folder of {zoo_folders()[0]}"
    at_hand = f"take one at hand: {', '.join(list(zoo)[:8])}" if zoo else "connect this machine once"
    return BackboneError(f"backbone {name}: its weights are not on this machine, and {why}. "
                         f"What is missing is {file}. {place}, or {at_hand}.")  # fmt: skip
