"""Features on disk, keyed by what they depend on: weights, view, precision, and the image's bytes.

Each extraction adds one safetensors shard, written whole and renamed into place, so two processes may
write at once and a killed one leaves nothing half done. A renamed or copied image is a hit; a changed
one is a miss. The folders used longest ago go first when the whole exceeds its bound.
"""

import json
import os
import shutil
import uuid
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from finetune.data.decoding import ImageFacts
from finetune.recipe.runs import write_whole
from finetune.recipe.shelf import cache_folder

FORMAT = "1"
"""Part of the key; raised when what is stored changes."""
LIMIT_BYTES = 20 * 10**9


class FeatureCache:
    """Pooled features (D,) and image facts by content digest, for one backbone and view."""

    def __init__(self, weights_digest: str, view_digest: str, precision: str) -> None:
        self.folder = cache_folder() / "features" / f"{weights_digest[:16]}-{view_digest}-{precision}-v{FORMAT}"
        self._rows: dict[str, torch.Tensor] = {}
        self._facts: dict[str, ImageFacts] = {}
        self._fresh: list[str] = []
        for path in sorted(self.folder.glob("*.safetensors")):
            self._read(path)
        if self.folder.is_dir():
            os.utime(self.folder)

    def __contains__(self, digest: str) -> bool:
        return digest in self._rows

    def features(self, digest: str) -> torch.Tensor:
        """(D,) in float32."""
        return self._rows[digest]

    def facts(self, digest: str) -> ImageFacts:
        """What decoding found out about the image."""
        return self._facts[digest]

    def put(self, digest: str, features: torch.Tensor, facts: ImageFacts) -> None:
        """Remember one image; `flush` writes it."""
        if digest not in self._rows:
            self._fresh.append(digest)
        self._rows[digest], self._facts[digest] = features, facts

    def flush(self) -> None:
        """Write what is new as one shard."""
        if not self._fresh:
            return
        facts = json.dumps(
            [[d, f.width, f.height, f.kind, f.is_rotated] for d in self._fresh for f in [self._facts[d]]]
        )
        stacked = torch.stack([self._rows[digest] for digest in self._fresh])
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        write_whole(path, lambda temporary: save_file({"features": stacked}, temporary, metadata={"images": facts}))
        self._fresh = []
        evict(self.folder.parent, keep=self.folder)

    def _read(self, path: Path) -> None:
        from safetensors import safe_open

        rows = load_file(path)["features"]
        with safe_open(path, framework="pt") as handle:
            images = json.loads(handle.metadata()["images"])
        for row, (digest, width, height, kind, is_rotated) in zip(rows, images, strict=True):
            self._rows[digest] = row
            self._facts[digest] = ImageFacts(width=width, height=height, kind=kind, is_rotated=is_rotated)


def evict(parent: Path, *, keep: Path, limit_bytes: int = LIMIT_BYTES) -> None:
    """Remove the folders used longest ago until `parent` holds at most `limit_bytes`; never `keep`."""
    folders = sorted((path for path in parent.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(part.stat().st_size for part in path.glob("*.safetensors")) for path in folders}
    total = sum(sizes.values())
    for folder in folders:
        if total <= limit_bytes:
            return
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            total -= sizes[folder]
