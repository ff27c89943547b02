"""Splits are a function of content and seed; the data here are digests alone."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest

from finetune.data.splits import cut_split
from finetune.errors import DataError

SHARES = {"val": 0.15, "calibration": 0.1, "test": 0.2}


def digest(number):
    return hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()


def cut(labels, digests=None, given=None, *, seed=0, limit=None, classes=None, **shares):
    digests = digests or [digest(i) for i in range(len(labels))]
    return cut_split(
        labels,
        digests,
        given or [None] * len(labels),
        classes or [f"class{k}" for k in range(max(labels) + 1)],
        seed=seed,
        max_train_per_class=limit,
        **(SHARES | shares),
    )


def by_digest(split, digests):
    return dict(zip(digests, split.roles, strict=True))


def test_shares_hold_in_every_class():
    split = cut([0] * 100 + [1] * 40 + [2] * 20)
    assert split.counts == {"train": (55, 22, 11), "val": (15, 6, 3), "calibration": (10, 4, 2), "test": (20, 8, 4)}
    assert (split.leaks, split.warnings, len(split.digest)) == (0, (), 32)


def test_order_and_names_change_nothing():
    labels, digests = [i % 3 for i in range(90)], [digest(i) for i in range(90)]
    shuffle = np.random.default_rng(0).permutation(90)
    one = cut(labels, digests)
    other = cut([labels[i] for i in shuffle], [digests[i] for i in shuffle])
    assert by_digest(one, digests) == by_digest(other, [digests[i] for i in shuffle])
    assert one.digest == other.digest


def test_the_seed_decides():
    labels = [i % 2 for i in range(80)]
    assert cut(labels).roles == cut(labels).roles
    assert cut(labels).roles != cut(labels, seed=1).roles
    assert cut(labels).digest != cut(labels, seed=1).digest


@pytest.mark.slow
def test_one_more_image_moves_few():
    labels, digests = [i % 2 for i in range(200)], [digest(i) for i in range(200)]
    before = by_digest(cut(labels, digests), digests)
    for extra in range(20):
        more = [*digests, digest(f"new {extra}")]
        after = by_digest(cut([*labels, 0], more), more)
        assert sum(before[d] != after[d] for d in digests) <= 4


def test_the_test_set_does_not_depend_on_the_other_shares():
    labels = [i % 2 for i in range(100)]
    one, other = cut(labels), cut(labels, val=0.3, calibration=0.0)
    assert [r == "test" for r in one.roles] == [r == "test" for r in other.roles]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, {"train": 1, "val": 0, "test": 0, "calibration": 0}),
        (2, {"train": 2, "val": 0, "test": 0, "calibration": 0}),
        (3, {"train": 1, "val": 1, "test": 1, "calibration": 0}),
        (5, {"train": 2, "val": 1, "test": 1, "calibration": 1}),
    ],
)
def test_tiny_classes_serve_train_first_then_val_then_test(size, expected):
    split = cut([0] * size + [1] * 40)
    assert {role: counts[0] for role, counts in split.counts.items()} == expected


def test_train_keeps_one_even_when_shares_would_take_all():
    split = cut([0] * 4 + [1] * 4, val=0.4, test=0.4, calibration=0.19)
    assert all(n >= 1 for n in split.counts["train"])
    assert cut([0, 0, 1, 1], val=0.5, test=0.4, calibration=0.0).counts["val"] == (1, 1)


def test_a_share_of_zero_cuts_none():
    split = cut([0, 1] * 20, val=0.0, calibration=0.0)
    assert set(split.roles) == {"train", "test"}


def test_copies_never_straddle_a_cut():
    digests = [digest(i // 3) for i in range(240)]  # every image three times
    labels = [(i // 3) % 2 for i in range(240)]
    for seed in range(5):
        split = cut(labels, digests, seed=seed)
        assert len(set(zip(digests, split.roles, strict=True))) == 80
        assert all(split.counts[role][0] > 0 for role in split.counts)
        assert split.leaks == 0


def test_copies_under_two_labels_stay_together_and_are_reported():
    digests = [digest(i % 50) for i in range(100)]
    split = cut([0] * 50 + [1] * 50, digests, classes=["cat", "dog"])
    assert len(set(zip(digests, split.roles, strict=True))) == 50
    assert any(
        "50 images appear, byte for byte, under several labels" in w and "'cat' and 'dog'" in w for w in split.warnings
    )


def test_a_class_of_copies_of_one_image_is_for_training():
    split = cut([0] * 9 + [1] * 9, [digest(0)] * 9 + [digest(i) for i in range(1, 10)])
    assert split.counts["train"][0] == 9
    assert any(w.startswith("test got no image of 1 of 2 classes") and "class0" in w for w in split.warnings)


def test_large_groups_still_leave_every_role_something():
    digests = [digest(i // 5) for i in range(20)]  # four groups of five: none fits into a share of 3
    split = cut([0] * 20 + [1] * 20, digests + [digest(100 + i) for i in range(20)], calibration=0.0)
    assert split.counts["test"][0] == 5 and split.counts["val"][0] == 5 and split.counts["train"][0] == 10


def test_given_roles_are_respected_and_missing_ones_cut_from_train():
    labels = [i % 2 for i in range(120)]
    given = ["train"] * 80 + ["test"] * 40
    split = cut(labels, given=given)
    assert split.roles[80:] == ("test",) * 40
    assert split.counts == {"train": (30, 30), "val": (6, 6), "calibration": (4, 4), "test": (20, 20)}


def test_a_missing_test_is_cut_though_val_is_given():
    labels = [i % 2 for i in range(100)]
    split = cut(labels, given=["train"] * 80 + ["val"] * 20)
    assert split.roles[80:] == ("val",) * 20
    assert split.counts["test"] == (8, 8)


def test_nothing_is_cut_where_all_is_given():
    given = ["train", "val", "calibration", "test"] * 10
    assert cut([i // 4 % 2 for i in range(40)], given=given).roles == tuple(given)


def test_leaks_across_given_roles_are_counted_and_named():
    labels, given = [0, 1] * 10, ["train"] * 12 + ["val"] * 4 + ["test"] * 4
    digests = [digest(i) for i in range(20)]
    digests[16], digests[17], digests[12] = digests[0], digests[1], digests[2]
    digests[19] = digests[13]  # val and test share one, too
    split = cut(labels, digests, given, calibration=0.0)
    assert split.leaks == 4
    assert "4 images" in split.warnings[0] and "1 in val, 3 in test" in split.warnings[0]
    assert "test score is flattered" in split.warnings[0]


def test_copies_inside_one_role_are_no_leak():
    assert cut([0, 1] * 4, [digest(i // 4) for i in range(8)], ["train"] * 4 + ["test"] * 4).leaks == 0


def test_limits_are_nested_and_leave_the_rest_alone():
    labels = [i % 2 for i in range(200)]
    kept = {limit: cut(labels, limit=limit) for limit in (1, 5, 20, 50)}
    everything = cut(labels)
    for limit, split in kept.items():
        assert split.counts["train"] == (min(limit, 55),) * 2
        assert [r if r not in ("train", "unused") else "train" for r in split.roles] == list(everything.roles)
    chosen = [{i for i, role in enumerate(split.roles) if role == "train"} for split in kept.values()]
    assert all(small < large for small, large in pairwise(chosen))


def test_the_digest_changes_with_any_image_label_or_role():
    labels, digests, given = [0, 1] * 6, [digest(i) for i in range(12)], ["train"] * 8 + ["test"] * 4
    none = {"val": 0.0, "calibration": 0.0}
    variants = [
        cut(labels, digests, given, **none),
        cut([1, 0, *labels[2:]], digests, given, **none),
        cut(labels, [digest("x"), *digests[1:]], given, **none),
        cut(labels, digests, ["test", *given[1:]], **none),
        cut(labels, digests, given, limit=3, **none),
    ]
    assert len({split.digest for split in variants}) == len(variants)


def test_a_single_class_left_to_train_on_is_refused():
    with pytest.raises(DataError, match="1 of 2 classes have an image to train on"):
        cut([0, 0, 1, 1], given=["train", "train", "test", "test"])


@pytest.mark.parametrize(
    "wrong", [{"val": 1.0}, {"val": -0.1}, {"val": 0.5, "test": 0.5}, {"test": float("nan")}, {"limit": 0}]
)
def test_impossible_wishes_are_our_bug(wrong):
    with pytest.raises(ValueError, match=r"shares|max_train"):
        cut([0, 1] * 5, **wrong)


def test_lists_that_do_not_fit_are_our_bug():
    with pytest.raises(ValueError, match="differ in length"):
        cut([0, 1], [digest(0)])
    with pytest.raises(ValueError, match="unknown roles"):
        cut([0, 1], given=["train", "valid"])
