"""Images in class folders, perhaps inside folders named like splits."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from finetune.data.items import Found, Items, Listing
from finetune.data.split_names import Splits, item_name, normal_text, role_of, unknown_split
from finetune.data.walking import holds_images, image_files, is_image, listed
from finetune.errors import DataError


def folder_images(root: Path, folders: Sequence[tuple[Path, str | None]], warnings: list[str]) -> Listing:
    """The images in class folders, each with its role; `warnings` are taken over.

    Raises:
        DataError: if images lie beside no class folder.
    """
    loose = [f for parent in {root} | {folder.parent for folder, _ in folders} for f in listed(parent) if is_image(f)]
    if not folders and (lone := loose or list(image_files(root, Counter()))):
        raise DataError(
            f"data.root: {lone[0].parent} holds images directly, without class folders. Put each image into a "
            "folder named like its class, or write a table with columns image,label and give that."
        )
    skipped: Counter[str] = Counter()
    items = Items(
        Found(item_name(file, root), normal_text(folder.name), role, file)
        for folder, role in folders
        for file in image_files(folder, skipped)
    )
    if skipped:
        kinds = ", ".join(f"{n} x {kind}" for kind, n in sorted(skipped.items()))
        warnings.append(
            f"{skipped.total()} files in class folders are no images by their names and were left: {kinds}."
        )
    if loose:
        warnings.append(f"{len(loose)} images lie outside any class folder and were left (the first: {min(loose)}).")
    return Listing(kind="folders", items=items, warnings=tuple(warnings))


def class_folders(root: Path, splits: Splits | None = None) -> list[tuple[Path, str | None]]:
    """Folders that hold images, each with the role its parent gives it. A class may be called `test`, too."""
    folders = [f for f in listed(root) if f.is_dir() and holds_images(f)]
    named = [(f, role) for f in folders if (role := role_of(f.name, splits))]
    inside = [(c, role) for f, role in named for c in listed(f) if c.is_dir() and holds_images(c)]
    if not any(role == "train" for _, role in inside):
        if len(named) < len(folders):
            return [(f, None) for f in folders]
        if inside:
            names = ", ".join(f.name for f, _ in named)
            raise DataError(f"data.root: {root} holds {names} but no `train` folder of class folders. Add it.")
        return []
    for other in (f for f in folders if role_of(f.name, splits) is None):
        raise unknown_split(other.name, str(other), splits)
    return [*inside]
