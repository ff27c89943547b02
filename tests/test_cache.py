"""The feature cache: the right rows for the right bytes, whatever else happens to the files."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import finetune as ft
from finetune.compute import PLAIN
from finetune.data.decoding import ImageFacts, facts_row
from finetune.features import cache as cache_module
from finetune.features.cache import FeatureCache, evict
from finetune.features.extraction import extract
from finetune.features.survey import look
from finetune.models.frozen import FrozenBackbone

FACTS = ImageFacts(width=30, height=20, kind="16-bit", is_rotated=True)
SMALL = ["data.image_size=32", "train.strategy=probe", "tracking.enabled=false"]


def digest(number):
    return f"{number:032x}"


def put(cache, *numbers, depths=3):
    for number in numbers:
        cache.put(digest(number), [torch.full((4 + k,), float(number + k)) for k in range(depths)], FACTS)


@pytest.mark.technique("T005")
def test_cached_features_come_back_to_the_last_bit():
    cache, rows = FeatureCache("w" * 64, "v", "32"), [torch.randn(5), torch.randn(7)]
    cache.put(digest(1), rows, FACTS)
    cache.flush()
    again = FeatureCache("w" * 64, "v", "32")
    assert again.known([digest(1), digest(2)]) == [True, False]
    for depth in (0, -1):
        assert torch.equal(again.features([digest(1)], depth)[0], rows[depth])
    assert again.facts([digest(1)]).tolist() == [list(facts_row(FACTS))]


def test_rows_come_in_the_order_asked_for_from_any_number_of_shards():
    cache = FeatureCache("w" * 64, "v", "32")
    for number in (5, 3, 9, 1):
        put(cache, number)
        cache.flush()
    again = FeatureCache("w" * 64, "v", "32")
    asked = [9, 1, 1, 5, 3]
    assert again.features([digest(n) for n in asked], 0)[:, 0].tolist() == asked
    with pytest.raises(KeyError, match=digest(4)):
        again.features([digest(4)])


def test_another_weight_view_or_precision_is_another_cache():
    cache = FeatureCache("w" * 64, "v", "32")
    put(cache, 1)
    cache.flush()
    for key in (("x" * 64, "v", "32"), ("w" * 64, "u", "32"), ("w" * 64, "v", "bf16")):
        assert FeatureCache(*key).known([digest(1)]) == [False]


def test_two_writers_do_not_disturb_each_other():
    one, two = FeatureCache("w" * 64, "v", "32"), FeatureCache("w" * 64, "v", "32")
    put(one, 1, 3)
    put(two, 2, 3)
    one.flush()
    two.flush()
    both = FeatureCache("w" * 64, "v", "32")
    assert both.features([digest(n) for n in (1, 2, 3)], 0)[:, 0].tolist() == [1, 2, 3]


def test_a_long_extraction_is_kept_shard_by_shard(monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 4)
    cache = FeatureCache("w" * 64, "v", "32")
    put(cache, *range(10))  # and no flush: killed here
    assert sum(FeatureCache("w" * 64, "v", "32").known([digest(n) for n in range(10)])) == 8


def test_a_damaged_shard_is_as_if_it_had_never_been():
    cache = FeatureCache("w" * 64, "v", "32")
    put(cache, 1)
    cache.flush()
    put(cache, 2)
    cache.flush()
    first = next(iter(sorted(cache.folder.iterdir())))
    first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    again = FeatureCache("w" * 64, "v", "32")
    assert sum(again.known([digest(1), digest(2)])) == 1
    assert not first.exists()


def test_the_shards_used_longest_ago_go_first(tmp_path):
    (tmp_path / "k").mkdir()
    for age, name in enumerate(("new", "old", "mine")):
        path = tmp_path / "k" / f"{name}.safetensors"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 - age, 1000 - age))
    evict(tmp_path, keep={tmp_path / "k" / "mine.safetensors"}, limit_bytes=250)
    assert sorted(path.stem for path in (tmp_path / "k").iterdir()) == ["mine", "new"]


def test_a_bound_holds_while_more_is_put_and_what_is_mapped_stays_readable():
    cache = FeatureCache("w" * 64, "v", "32", limit_bytes=1500)
    reader = None
    for number in range(12):
        cache = FeatureCache("w" * 64, "v", "32", limit_bytes=1500)
        put(cache, number)
        cache.flush()
        reader = reader or FeatureCache("w" * 64, "v", "32")
    files = list(cache.folder.glob("*.safetensors"))
    assert 0 < sum(path.stat().st_size for path in files) <= 1500
    assert reader.features([digest(0)], 0)[0, 0] == 0  # its file is gone, its mapping is not


@pytest.mark.slow
def test_memory_stays_flat_while_many_images_are_known(tmp_path):
    code = """
import resource, sys, numpy as np, torch
from safetensors.torch import save_file
from finetune.features.cache import FeatureCache
cache = FeatureCache("w" * 64, "v", "32")
cache.folder.mkdir(parents=True)
for shard in range(25):
    digests = torch.from_numpy(np.random.default_rng(shard).integers(0, 256, (4000, 16), dtype=np.uint8))
    save_file({"depth.0": torch.zeros(4000, 8), "depth.-1": torch.ones(4000, 512), "digests": digests,
               "facts": torch.zeros(4000, 4, dtype=torch.int32)}, cache.folder / f"{shard}.safetensors")
def held():
    _, resident, shared, *_ = map(int, open("/proc/self/statm").read().split())
    return (resident - shared) * 4096 / 1e6  # mapped pages are shared: the kernel takes them back when it likes
before = held()
cache = FeatureCache("w" * 64, "v", "32")
assert len(cache._keys) == 100_000
assert cache.num_bytes > 200e6
some = [cache._keys[k].ljust(16, b"\\0").hex() for k in range(0, 100_000, 1000)]
assert float(cache.features(some).mean()) == 1.0
print(held() - before)
"""
    env = {**os.environ, "FINETUNE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20  # MB, of 205 on disk


def test_a_second_look_decodes_nothing(shapes):
    recipe = ft.load_recipe(str(shapes), SMALL)
    first, second = ft.survey(recipe), ft.survey(recipe)
    assert (first.features["hits"], first.features["misses"]) == (0, 72)
    assert (second.features["hits"], second.features["misses"]) == (72, 0)
    assert first.features["bytes"] == second.features["bytes"] > 72 * 128 * 4
    assert first.probe == second.probe


@pytest.mark.technique("T005")
def test_only_what_changed_is_computed_again(tmp_path):
    from conftest import draw_shapes

    root = draw_shapes(tmp_path / "images", per_class=8)
    counts = lambda *wishes: ft.survey(ft.load_recipe(str(root), [*SMALL, *wishes])).features["misses"]  # noqa: E731
    assert counts() == 24
    Image.fromarray(np.full((40, 40, 3), 77, dtype=np.uint8)).save(root / "disc" / "00.png")
    assert counts() == 1  # one image changed
    (root / "disc" / "01.png").rename(root / "disc" / "renamed.png")
    assert counts() == 0
    Image.fromarray(np.full((40, 40, 3), 99, dtype=np.uint8)).save(root / "disc" / "new.png")
    assert counts() == 1  # one image added
    assert counts("data.crop_pct=0.5") == 25
    assert counts("data.image_size=48") == 25
    assert counts("data.mean=[0.1,0.2,0.3]") == 25


def test_the_features_of_an_image_do_not_depend_on_what_else_is_looked_at(shapes):
    seen = look(ft.load_recipe(str(shapes), SMALL))
    index, view = seen.dataset.indices("train")[0], seen.facts.view
    alone = FeatureCache("alone", "v", "32")
    extract(
        seen.dataset.items,
        seen.dataset.digests,
        [index],
        view,
        backbone=lambda: FrozenBackbone(seen.backbone, size_pixels=view.size_pixels, device="cpu"),
        cache=alone,
        store=None,
        compute=PLAIN,
        progress=lambda done, total: None,
    )
    assert torch.equal(alone.features([seen.dataset.digests[index]])[0], seen.features("train")[0])
