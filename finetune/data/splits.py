"""Four roles for every image: train fits, val chooses, calibration tempers, test is looked at once.

Who goes where is decided by the content of an image and the seed, never by its name or place in a list: each
class is sorted by a hash of its bytes. So a renamed or reordered data set is cut alike, one more image moves
few others, and copies of one image stay on one side of every cut that we make.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from finetune.config.section import ROLES
from finetune.data.items import Items
from finetune.errors import DataError

UNUSED = "unused"
_CHOOSING = ("val", "calibration")
_CUT_ORDER = ("test", "val", "calibration")  # test first: then it stays the same whatever the others' shares


@dataclass(frozen=True, kw_only=True)
class Split:
    """The role of every image."""

    roles: tuple[str, ...]
    """Per item, one of `ROLES` or "unused"."""
    digest: str
    """32 hex digits that change when any image, label or role does, but not with names or order."""
    counts: dict[str, tuple[int, ...]]
    """Images per class, for each of `ROLES`."""
    leaks: int
    """Images whose bytes also lie in a role given before theirs (train, val, calibration, test)."""
    warnings: tuple[str, ...]


def cut_split(
    labels: Sequence[int],
    digests: Sequence[str],
    given: Sequence[str | None],
    classes: Sequence[str],
    *,
    val: float,
    calibration: float,
    test: float,
    seed: int,
    max_train_per_class: int | None = None,
    files: Sequence[str] | None = None,
) -> Split:
    """Respect the roles that are given and cut those that are missing, class by class.

    Where any role is given, what is missing is cut from the images given as train (and those without a role);
    else from all. Shares are of each class in that pool, rounded half up. Where a class has three images, val and
    test get at least one each; train always keeps one, then val, test and calibration are served in this order.

    Args:
        labels: per image, index into `classes`.
        digests: per image, a hash of its bytes and of which frame it is; equal ones are copies.
        given: per image, one of `ROLES` or None.
        classes: names, for the warnings.
        val: share in [0, 1); 0 cuts none. Ignored where the role is given; likewise `calibration` and `test`.
        calibration: see `val`.
        test: see `val`.
        seed: another seed, another cut.
        max_train_per_class: surplus train images become "unused"; a smaller limit keeps a subset of a larger one's.
        files: per image, a hash of the file, whose frames stay on one side; None: every image is a file.

    Raises:
        DataError: if fewer than two classes have an image to train on.
        ValueError: if lengths, roles or shares make no sense.
    """
    files = digests if files is None else files
    if not len(labels) == len(digests) == len(given) == len(files):
        raise ValueError(f"labels, digests and given differ in length: {len(labels)}, {len(digests)}, {len(given)}.")
    if unknown := set(given) - {None, *ROLES}:
        raise ValueError(f"given names unknown roles {sorted(map(str, unknown))}; known are {', '.join(ROLES)}.")
    shares = {"test": test, "val": val, "calibration": calibration}
    wanted = {role: shares[role] for role in _CUT_ORDER if role not in given}
    if any(not 0 <= share < 1 for share in wanted.values()) or not sum(wanted.values()) < 1:
        raise ValueError(f"shares must lie in [0, 1) and leave something to train on, got {wanted}.")
    if max_train_per_class is not None and max_train_per_class < 1:
        raise ValueError(f"max_train_per_class must be at least 1, got {max_train_per_class}.")
    ranks = {digest: _rank(seed, digest) for digest in {*digests, *files}}
    roles = [role or "train" for role in given]
    pool = [i for i, role in enumerate(roles) if role == "train"]
    for role, chosen in _cut(pool, labels, files, ranks, wanted).items():
        for i in chosen:
            roles[i] = role
    if max_train_per_class is not None:
        for i in _surplus(roles, labels, digests, ranks, max_train_per_class):
            roles[i] = UNUSED
    return _split(roles, labels, digests, given, files=files, classes=classes, wanted=wanted)


def refuse_lost(items: Items, classes: Sequence[str], bad: Mapping[int, str]) -> None:
    """Nothing, if without the bad ones every class has an image to train on, and every role that was given one.

    Args:
        items: all of a source.
        classes: their names.
        bad: why an item cannot be read, by its place.

    Raises:
        DataError: naming the classes and roles that were lost, and why.
    """
    if not bad:
        return
    labels, given = items.labels.tolist(), [items.role(index) for index in range(len(items))]
    good = [index for index in range(len(items)) if index not in bad]
    learned = {labels[index] for index in good if given[index] in (None, "train")}
    served = {given[index] for index in good}
    lost = defaultdict[str, Counter[str]](Counter)
    for index, why in sorted(bad.items()):
        if labels[index] not in learned:
            lost[f"class {classes[labels[index]]}"][why] += 1
        elif given[index] not in served:
            lost[f"the {given[index]} images"][why] += 1
    if lost:
        told = [
            f"{name} ({', '.join(f'{count} x {why}' for why, count in reasons.most_common(3))})"
            for name, reasons in lost.items()
        ]
        more = f" and {len(told) - 5} more" if len(told) > 5 else ""
        raise DataError(
            f"no image that can be read is left of {'; '.join(told[:5])}{more}. Mend these files, save them as JPEG "
            "or PNG, or take the folder away."
        )


def refuse_idle(roles: Sequence[str], given: Sequence[str | None], val: float) -> None:
    """Nothing, if there are images to train on and images to choose by.

    Args:
        roles: of every image, as it was divided.
        given: the role that the source itself names, or None.
        val: the share that was to be cut.

    Raises:
        DataError: saying what is missing and what would help.
    """
    for role in ("train", "val"):
        if role in roles:
            continue
        if role in given:
            do = f"those that are given as {role} cannot be read; mend them, or take them away and let a part be cut"
        elif role == "val" and val == 0:
            do = "data.split.val is 0; raise it, 0.15 is usual"
        else:
            do = f"{len(roles)} images are too few to cut a part from; add images, three or more of each class"
        raise DataError(f"no images play the role {role}: {do}.")


def labelled_rows(roles: Sequence[str], files: Sequence[str]) -> list[int]:
    """The images that a model may end on once all is chosen: those of train, val and calibration.

    Val and calibration images whose very file also lies in test are left out: where a source divides itself, they may.

    Args:
        roles: of every image, as it was divided.
        files: per image, a hash of its file.
    """
    tested = {file for file, role in zip(files, roles, strict=True) if role == "test"}
    pairs = enumerate(zip(roles, files, strict=True))
    return [i for i, (role, file) in pairs if role == "train" or (role in _CHOOSING and file not in tested)]


def draw_sample(
    indices: Iterable[int], labels: Sequence[int], digests: Sequence[str], *, most: int, seed: int
) -> list[int]:
    """At most `most` of `indices`, each class by its share but two of each first; no content twice.

    Which images, and in which order they come, depends on their bytes, labels and the seed alone.

    Args:
        indices: the images to draw from.
        labels: of every image.
        digests: a hash of the bytes of every image; of copies the one with the lowest label is taken.
        most: size of the sample.
        seed: another seed, another sample.
    """
    unique: dict[str, int] = {}
    for i in sorted(indices, key=lambda i: labels[i]):
        unique.setdefault(digests[i], i)
    homes: defaultdict[int, list[int]] = defaultdict(list)
    for digest in sorted(unique, key=lambda digest: _rank(seed, digest)):
        homes[labels[unique[digest]]].append(unique[digest])
    turns = {i: max(0, turn - 1) / len(own) for own in homes.values() for turn, i in enumerate(own)}
    ranks = {i: _rank(seed, digests[i]) for i in turns}
    return sorted(sorted(turns, key=lambda i: (turns[i], ranks[i]))[:most], key=ranks.__getitem__)


def _rank(seed: int, digest: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{digest}".encode(), digest_size=16).digest()


def _cut(
    pool: Sequence[int],
    labels: Sequence[int],
    files: Sequence[str],
    ranks: Mapping[str, bytes],
    wanted: Mapping[str, float],
) -> dict[str, list[int]]:
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for i in pool:
        groups[files[i]].append(i)
    homes: defaultdict[int, list[list[int]]] = defaultdict(list)
    for file in sorted(groups, key=ranks.__getitem__):
        # Copies with different labels go together too, counted in the lowest class.
        homes[min(labels[i] for i in groups[file])].append(groups[file])
    chosen: dict[str, list[int]] = {role: [] for role in wanted}
    for members in homes.values():
        needs = _needs(sum(map(len, members)), wanted)
        left = list(members)
        for role in wanted:
            taken = _take(left, needs[role])
            chosen[role] += [i for group in taken for i in group]
            gone = {id(group) for group in taken}
            left = [group for group in left if id(group) not in gone]
    return chosen


def _needs(size: int, wanted: Mapping[str, float]) -> dict[str, int]:
    needs, left = {}, size - 1
    for role in ("val", "test", "calibration"):
        share = wanted.get(role, 0.0)
        least = 1 if share > 0 and size >= 3 and role != "calibration" else 0
        needs[role] = min(max(int(share * size + 0.5), least), left)
        left -= needs[role]
    return needs


def _take(groups: Sequence[list[int]], need: int) -> list[list[int]]:
    """Groups in order while they fit into `need`; if none fits, the first, as long as another remains."""
    taken: list[list[int]] = []
    filled = 0
    for group in groups:
        if filled + len(group) <= need and len(taken) < len(groups) - 1:
            taken.append(group)
            filled += len(group)
    return taken if taken or not need or len(groups) < 2 else [groups[0]]


def _surplus(
    roles: Sequence[str], labels: Sequence[int], digests: Sequence[str], ranks: Mapping[str, bytes], limit: int
) -> list[int]:
    train: defaultdict[int, list[int]] = defaultdict(list)
    for i, role in enumerate(roles):
        if role == "train":
            train[labels[i]].append(i)
    return [i for members in train.values() for i in sorted(members, key=lambda i: ranks[digests[i]])[limit:]]


def _split(
    roles: Sequence[str],
    labels: Sequence[int],
    digests: Sequence[str],
    given: Sequence[str | None],
    *,
    files: Sequence[str],
    classes: Sequence[str],
    wanted: Mapping[str, float],
) -> Split:
    tally = Counter(zip(roles, labels, strict=True))
    counts = {role: tuple(tally[role, label] for label in range(len(classes))) for role in ROLES}
    if (learnable := sum(n > 0 for n in counts["train"])) < 2:
        raise DataError(
            f"data.split: {learnable} of {len(classes)} classes have an image to train on; it takes two. "
            "Add images, or ask for smaller shares of val, calibration and test."
        )
    leaked = _leaked(files, given)
    lines = sorted(f"{d}\t{label}\t{role}\n" for d, label, role in zip(digests, labels, roles, strict=True))
    return Split(
        roles=tuple(roles),
        digest=hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest(),
        counts=counts,
        leaks=leaked.total(),
        warnings=tuple(_warnings(leaked, labels, digests, classes=classes, counts=counts, wanted=wanted)),
    )


def _leaked(files: Sequence[str], given: Sequence[str | None]) -> Counter[str]:
    """Per role, the images whose bytes also lie in a role before it."""
    first: dict[str, int] = {}
    order = [(digest, ROLES.index(role)) for digest, role in zip(files, given, strict=True) if role]
    for digest, at in order:
        first[digest] = min(at, first.get(digest, at))
    return Counter(ROLES[at] for digest, at in order if at > first[digest])


def _warnings(
    leaked: Counter[str],
    labels: Sequence[int],
    digests: Sequence[str],
    *,
    classes: Sequence[str],
    counts: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, float],
) -> Iterable[str]:
    if leaked:
        where = ", ".join(f"{leaked[role]} in {role}" for role in ROLES if leaked[role])
        scores = "the test score is" if leaked["test"] else "scores on them are"
        yield (
            f"{leaked.total()} images lie byte for byte in two of the given splits ({where}): {scores} flattered. "
            "Remove them from one of the two."
        )
    named: defaultdict[str, set[int]] = defaultdict(set)
    for digest, label in zip(digests, labels, strict=True):
        named[digest].add(label)
    if torn := sorted(sorted(found) for found in named.values() if len(found) > 1):
        example = " and ".join(repr(classes[label]) for label in torn[0])
        yield f"{len(torn)} images appear, byte for byte, under several labels (one under {example}). Decide for one."
    for role, share in wanted.items():
        if share > 0 and (empty := [classes[label] for label, n in enumerate(counts[role]) if not n]):
            names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            yield f"{role} got no image of {len(empty)} of {len(classes)} classes, which have too few: {names}."
