"""Features on disk, keyed by what they depend on: weights, view, precision, depth, and the image's bytes.

Rows lie in safetensors shards that are mapped, not read: a million images cost 24 bytes each in memory until their
rows are asked for. Shards are written whole and renamed into place, so two processes may write at once and a killed
one leaves nothing half done. A renamed or copied image is a hit; a changed one is a miss. The shards used longest ago
go first when the whole exceeds its bound. A disk that does not take a shard stops nobody: it is held in memory.
"""

import json
import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from finetune.config.backbone_names import cache_folder
from finetune.data.decoding import ImageFacts, facts_row
from finetune.runs.folder import write_whole

FORMAT = "3"
"""Part of the key; raised when what is stored, or how it is computed, changes."""
LIMIT_BYTES = 20 * 10**9
SHARD_ROWS = 4096
"""Images per shard: what a killed extraction loses at most."""
_TYPES: dict[str, Any] = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4"), "U8": np.dtype("u1")}


class FeatureCache:
    """Pooled features of every depth, and image facts, by content digest; for one backbone, view and precision."""

    def __init__(
        self, weights_digest: str, view_digest: str, precision: str, *, limit_bytes: int = LIMIT_BYTES
    ) -> None:
        self._key = f"{weights_digest[:16]}-{view_digest}-{precision}-v{FORMAT}"
        self.unkept: str | None = None
        """Why what is new is not kept on disk; None while it is."""
        self._limit_bytes = limit_bytes
        self._shards: list[dict[str, np.ndarray]] = []
        self._paths: list[Path | None] = []
        self._fresh: list[tuple[str, Sequence[torch.Tensor], ImageFacts]] = []
        self._waiting: dict[str, int] = {}
        self._used: set[Path] = set()
        with suppress(OSError):  # a cache that cannot be read is an empty one
            for path in sorted(self.folder.glob("*.safetensors")):
                self._open(path)
        self._index()

    @property
    def folder(self) -> Path:
        """Where the shards lie.

        Raises:
            OSError: where there is no home for them.
        """
        return cache_folder() / "features" / self._key

    def keep(self, write: Callable[[], None]) -> bool:
        """Whether `write` could keep something for later; once the disk has refused, it is not asked again."""
        if self.unkept is None:
            try:
                write()
            except OSError as fault:
                where = f"{fault.filename}: " if fault.filename else ""
                self.unkept = f"{where}{fault.strerror or fault}"
        return self.unkept is None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to tell of the cache: nothing, or why nothing is kept."""
        if self.unkept is None:
            return ()
        return (
            f"features are not kept ({self.unkept}), so the next look at these images computes them again. "
            "FINETUNE_CACHE may name another folder.",
        )

    def known(self, digests: Sequence[str]) -> list[bool]:
        """Whether each image has its features here."""
        stored = self._find(digests) >= 0
        return [bool(here) or digest in self._waiting for here, digest in zip(stored, digests, strict=True)]

    @property
    def num_bytes(self) -> int:
        """Bytes of everything this cache can answer."""
        return sum(sum(part.nbytes for part in shard.values()) for shard in self._shards)

    def features(self, digests: Sequence[str], depth: int = -1) -> torch.Tensor:
        """(N, D) in float32 at `depth`: a stage counted from the stem, or -1 for the pooled features of the top.

        Raises:
            KeyError: if an image was never put.
        """
        self.flush()
        places = self._places(digests)
        if not len(places):
            return torch.empty(0, 0)
        name = f"depth.{depth}"
        rows: np.ndarray | None = None
        for shard in np.unique(places[:, 0]):
            chosen = places[:, 0] == shard
            part = self._shards[shard][name]
            rows = np.empty((len(places), part.shape[1]), dtype=np.float32) if rows is None else rows
            rows[chosen] = part[places[chosen, 1]]
            self._touch(self._paths[shard])
        return torch.from_numpy(rows)

    def facts(self, digests: Sequence[str]) -> np.ndarray:
        """What decoding found out about each image, (N, 4) int32 as `facts_row` writes it.

        Raises:
            KeyError: if an image was never put.
        """
        self.flush()
        places = self._places(digests)
        rows = np.empty((len(places), 4), dtype=np.int32)
        for shard in np.unique(places[:, 0]):
            chosen = places[:, 0] == shard
            rows[chosen] = self._shards[shard]["facts"][places[chosen, 1]]
        return rows

    def put(self, digest: str, depths: Sequence[torch.Tensor], facts: ImageFacts) -> None:
        """Remember one image: its features (D,) at each stage from the stem, then the pooled top; `flush` writes it."""
        if self.known([digest])[0]:
            return
        self._waiting[digest] = len(self._fresh)
        self._fresh.append((digest, depths, facts))
        if len(self._fresh) >= SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is new as one shard."""
        if not self._fresh:
            return
        digests, rows, facts = zip(*self._fresh, strict=True)
        tensors = {f"depth.{k}": torch.stack([row[k] for row in rows]) for k in range(len(rows[0]) - 1)}
        tensors["depth.-1"] = torch.stack([row[-1] for row in rows])
        tensors["digests"] = torch.from_numpy(_as_bytes(digests))
        tensors["facts"] = torch.tensor([facts_row(one) for one in facts], dtype=torch.int32)
        if not self.keep(lambda: self._write(tensors)):
            self._shards.append({name: tensor.numpy() for name, tensor in tensors.items()})
            self._paths.append(None)
        self._fresh, self._waiting = [], {}
        self._index()

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        write_whole(path, lambda temporary: save_file(tensors, temporary))
        self._shards.append(_map(path))
        self._paths.append(path)
        self._used.add(path)
        evict(path.parent.parent, keep=self._used, limit_bytes=self._limit_bytes)

    def _touch(self, path: Path | None) -> None:
        if path is not None and path not in self._used:
            with suppress(OSError):  # evicted, or the user's to read only
                os.utime(path)
            self._used.add(path)

    def _open(self, path: Path) -> None:
        try:
            self._shards.append(_map(path))
            self._paths.append(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            with suppress(OSError):  # evicted by another process just now, or damaged: as if never written
                path.unlink(missing_ok=True)

    def _index(self) -> None:
        """All digests in order, so that one is found by bisection."""
        digests = [shard["digests"] for shard in self._shards]
        keys = np.concatenate(digests) if digests else np.empty((0, 16), dtype=np.uint8)
        places = [np.stack([np.full(len(part), k), np.arange(len(part))], axis=1) for k, part in enumerate(digests)]
        self._where = np.concatenate(places).astype(np.int32) if places else np.empty((0, 2), dtype=np.int32)
        keys = np.ascontiguousarray(keys).view("S16").ravel()
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def _find(self, digests: Sequence[str]) -> np.ndarray:
        """Positions in the order of keys, -1 where there is none."""
        wanted = _as_bytes(digests).view("S16").ravel()
        at = np.minimum(np.searchsorted(self._keys, wanted), max(0, len(self._keys) - 1))
        return np.where(self._keys[at] == wanted, at, -1) if len(self._keys) else np.full(len(wanted), -1)

    def _places(self, digests: Sequence[str]) -> np.ndarray:
        """(N, 2): shard and row of each digest."""
        found = self._find(digests)
        if len(found) and found.min() < 0:
            raise KeyError(f"no features of {digests[int(found.argmin())]}")
        return self._where[self._order[found]]


def evict(parent: Path, *, keep: set[Path], limit_bytes: int) -> None:
    """Remove the shards used longest ago until `parent` holds at most `limit_bytes`; never one of `keep`."""
    shards = []
    for path in parent.glob("*/*.safetensors"):
        try:
            shards.append((path.stat().st_mtime, path.stat().st_size, path))
        except OSError:  # another process was quicker
            continue
    total = sum(size for _, size, _ in shards)
    for _, size, path in sorted(shards):
        if total <= limit_bytes:
            return
        if path not in keep:
            with suppress(OSError):  # another user's
                path.unlink(missing_ok=True)
                total -= size


def _as_bytes(digests: Sequence[str]) -> np.ndarray:
    """(N, 16) uint8 of digests in hexadecimal."""
    joined = bytearray().join(bytes.fromhex(digest) for digest in digests)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 16)


def _map(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped: pages are read when touched and given back when memory is short."""
    data = np.memmap(path, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    parts = {}
    for name, entry in header.items():
        if name != "__metadata__":
            low, high = (start + offset for offset in entry["data_offsets"])
            parts[name] = data[low:high].view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
    if parts["digests"].shape[1:] != (16,):
        raise ValueError(f"{path} is no shard of features")
    return parts
