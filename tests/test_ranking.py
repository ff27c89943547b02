"""Ranking: a probe decides, cheap measures break its ties, and only training images are looked at."""

import hashlib
import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from conftest import draw_shapes
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from finetune.cli import app
from finetune.config.backbone_names import default_backbone, read_zoo, shipped
from finetune.config.card import read_card
from finetune.config.facts import Ranking, RankRow
from finetune.config.measures import Measure, Proportion
from finetune.config.reading import load_recipe
from finetune.data.splits import draw_sample
from finetune.errors import BackboneError, DataError, RecipeError
from finetune.features.survey import look
from finetune.model_selection import ranking as ranking_module
from finetune.model_selection import zoo
from finetune.model_selection.ordering import Seen, explain, mean_z_scores, order_rows
from finetune.model_selection.ranking import choose_backbone, rank_backbones
from finetune.reporting.ranking_text import ranking_text

MEASURES = ("leep", "nce", "logme", "h_score")


def write_card(folder, state, *, arch="resnet18", num_classes=10, **changes):
    """A card beside its weights, as a zoo holds them."""
    folder.mkdir(parents=True)
    weights = folder / "weights.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
    fields = {
        "name": folder.name, "arch": arch, "num_classes": num_classes, "input_size": [3, 32, 32], "mean": [0.5] * 3,
        "std": [0.25] * 3, "interpolation": "bilinear", "crop_pct": 1.0, "licence": "Apache-2.0", "params_m": 0.979,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }  # fmt: skip
    (folder / "card.yaml").write_text(yaml.safe_dump(fields | changes))
    return read_card(folder / "card.yaml")


@pytest.fixture(scope="module")
def own_zoo(tmp_path_factory):
    """What is pretrained, the same worn, the same without a head, and an architecture whose weights are noise."""
    folder = tmp_path_factory.mktemp("zoo")
    source = shipped("zoo") / default_backbone()
    good = {
        name: t.float() if t.is_floating_point() else t for name, t in load_file(source / "weights.safetensors").items()
    }
    kwargs = {"arch_kwargs": read_card(source / "card.yaml").arch_kwargs}
    generator = torch.Generator().manual_seed(0)

    def noise(like, scale):
        return like + scale * torch.randn(like.shape, generator=generator) if like.ndim > 1 else like

    write_card(folder / "good", good, **kwargs)
    worn = {name: noise(t, 0.8 * float(t.std())) if t.ndim > 1 else t for name, t in good.items()}
    write_card(folder / "worn", worn, **kwargs, licence="MIT", params_m=0.5)
    write_card(folder / "headless", {n: t for n, t in good.items() if not n.startswith("fc.")}, num_classes=0, **kwargs)
    import timm

    wild = timm.create_model("test_efficientnet", num_classes=10).state_dict()
    wild = {n: 0.1 * torch.randn(t.shape, generator=generator) if t.is_floating_point() and "var" not in n else t
            for n, t in wild.items()}  # fmt: skip
    write_card(folder / "noise", wild, arch="test_efficientnet", licence="CC-BY-NC-4.0", params_m=0.4)
    return folder


def cards_of(own_zoo, *names):
    return {name: read_card(own_zoo / name / "card.yaml") for name in names}


def recipe_for(root, *wishes):
    return load_recipe(None, [f"data.root={root}", "data.image_size=32", *wishes])


@pytest.fixture(scope="module")
def ranked(own_zoo, shapes, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return rank_backbones(recipe_for(shapes), cards_of(own_zoo, "noise", "worn", "good"))


def numbers(ranking):
    """All but what a clock says."""
    return [row.model_dump(exclude={"milliseconds"}) for row in ranking.rows]


@pytest.mark.technique("T002")
def test_a_candidate_of_noise_is_last_by_every_measure(ranked):
    assert [row.name for row in ranked.rows] == ["good", "worn", "noise"]
    last = ranked.rows[-1]
    for row in ranked.rows[:-1]:
        assert row.probe.value > last.probe.value
        assert row.neighbours.value > last.neighbours.value
        for measure in MEASURES:
            assert getattr(row, measure) > getattr(last, measure), measure
    assert not last.is_tied
    assert last.behind.low > 0
    assert ranked.chosen == "good"


def test_measures_that_order_alike_agree(ranked):
    agreement = {(a, b): value for a, b, value in ranked.agreement}
    assert agreement["probe", "LogME"] == pytest.approx(1)
    assert len(agreement) == 15


def test_two_candidates_have_no_rank_correlation(own_zoo, shapes):
    assert rank_backbones(recipe_for(shapes), cards_of(own_zoo, "good", "worn")).agreement == ()


def test_cost_and_card_stand_beside_the_measures(ranked):
    row = ranked.rows[0]
    assert row.milliseconds > 0
    assert row.megabytes == pytest.approx(4 * 0.977, rel=0.01)
    assert (row.params_m, row.num_features, row.image_size, row.licence) == (0.977, 128, 32, "Apache-2.0")
    assert ranked.image_size == 32
    assert "all at 32 px" in ranking_text(ranked)


def test_each_looks_at_its_own_size_where_the_recipe_sets_none(own_zoo, shapes):
    cards = cards_of(own_zoo, "good", "worn")
    cards["worn"] = replace(cards["worn"], input_size=(3, 48, 48))
    found = rank_backbones(load_recipe(None, [f"data.root={shapes}"]), cards)
    assert {row.name: row.image_size for row in found.rows} == {"good": 32, "worn": 48}
    assert "each at its own size" in ranking_text(found)


@pytest.mark.technique("T002")
def test_a_candidate_without_a_head_completes_and_shows_no_number_where_there_is_none(own_zoo, shapes):
    found = rank_backbones(recipe_for(shapes), cards_of(own_zoo, "good", "headless", "worn"))
    row = next(row for row in found.rows if row.name == "headless")
    assert (row.leep, row.nce, row.response, row.taken_for) == (None, None, None, ())
    line = next(line for line in ranking_text(found).splitlines() if "headless" in line)
    assert line.split()[-2:] == ["n/a", "n/a"]
    assert "n/a: no source classifier." in " ".join(ranking_text(found).split())
    assert not any("LEEP" in pair for pair in found.agreement)


def test_a_tie_is_marked_and_the_rule_is_said(own_zoo, shapes):
    found = rank_backbones(
        recipe_for(shapes), cards_of(own_zoo, "headless", "good", "noise")
    )  # the same features twice
    first, second, last = found.rows
    assert (first.is_tied, second.is_tied, last.is_tied) == (True, True, False)
    assert (first.tie_score, second.tie_score, last.tie_score) == (0.0, 0.0, None)
    assert "cannot be told from it" in found.why
    assert "z-scores of k-NN and LogME decides" in found.why  # one has no LEEP
    text = ranking_text(found)
    assert text.count(" =") >= 2
    assert [line for line in text.splitlines() if len(line) > 100] == []


def test_only_training_images_are_looked_at(own_zoo, shapes, tmp_path):
    for role, numbers_of in {"train": range(14), "val": range(14, 19), "test": range(19, 24)}.items():
        for label in ("disc", "square", "stripes"):
            (tmp_path / "set" / role / label).mkdir(parents=True)
            for number in numbers_of:
                shutil.copy(shapes / label / f"{number:02}.png", tmp_path / "set" / role / label)
    recipe, cards = recipe_for(tmp_path / "set"), cards_of(own_zoo, "good", "worn")
    before = rank_backbones(recipe, cards)
    generator = np.random.default_rng(0)
    held = [*tmp_path.glob("set/val/*/*.png"), *tmp_path.glob("set/test/*/*.png")]
    assert len(held) == 30
    for path in held:
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    after = rank_backbones(recipe, cards)
    assert numbers(after) == numbers(before)
    assert after.features["misses"] == 0


def test_the_sample_is_of_the_images_that_a_run_trains_on(own_zoo, shapes):
    recipe = recipe_for(shapes, "train.strategy=probe", f"backbone={default_backbone()}")
    images = ranking_module._Images(recipe)
    seen = look(recipe)
    drawn = {images.dataset.items[index].name for index in images.draw(1000)}
    assert drawn == {seen.dataset.items[index].name for index in seen.dataset.indices("train")}


def test_a_second_ranking_looks_at_nothing(own_zoo, shapes):
    recipe, cards = recipe_for(shapes), cards_of(own_zoo, "good", "worn")
    first, second = rank_backbones(recipe, cards), rank_backbones(recipe, cards)
    assert first.features == {"hits": 0, "misses": 2 * first.num_images}
    assert second.features == {"hits": 2 * first.num_images, "misses": 0}
    assert numbers(first) == numbers(second)


def test_neither_names_nor_order_of_files_matter(own_zoo, shapes, ranked, tmp_path):
    random.seed(0)
    for label in shapes.iterdir():
        (tmp_path / label.name).mkdir()
        files = sorted(label.iterdir())
        for file, number in zip(files, random.sample(range(100), len(files)), strict=True):
            shutil.copy(file, tmp_path / label.name / f"{number:03}.png")
    found = rank_backbones(recipe_for(tmp_path), cards_of(own_zoo, "good", "noise", "worn"))
    assert numbers(found) == numbers(ranked)


def test_a_smaller_sample_keeps_every_class(own_zoo, shapes):
    found = rank_backbones(recipe_for(shapes), cards_of(own_zoo, "good"), most_images=12)
    assert found.num_images == 12
    assert [name for name, _, _ in found.rows[0].taken_for] == ["disc", "square", "stripes"]
    assert "the only backbone" in found.why


def test_a_sample_serves_rare_classes_first_and_takes_no_content_twice():
    labels = [0] * 900 + [1] * 90 + [2] * 2 + [0]
    digests = [f"{number:032x}" for number in range(992)] + [f"{3:032x}"]  # the last is a copy
    chosen = draw_sample(range(993), labels, digests, most=100, seed=0)
    counts = torch.bincount(torch.tensor([labels[index] for index in chosen])).tolist()
    assert len(chosen) == 100
    assert counts[2] == 2
    assert counts[0] == pytest.approx(90, abs=2)
    everything = draw_sample(range(993), labels, digests, most=2000, seed=0)
    assert len(everything) == 992
    assert chosen != draw_sample(range(993), labels, digests, most=100, seed=1)


def test_a_candidate_that_cannot_be_loaded_is_listed_with_the_reason(own_zoo, shapes):
    cards = cards_of(own_zoo, "good", "worn")
    cards["worn"] = replace(cards["worn"], sha256="0" * 64)
    found = rank_backbones(recipe_for(shapes), cards)
    assert [(one.name, "is not the file it should be" in one.reason) for one in found.unranked] == [("worn", True)]
    assert "Not ranked: worn:" in ranking_text(found)
    with pytest.raises(BackboneError, match="none of 1 backbones could look"):
        rank_backbones(recipe_for(shapes), {"worn": cards["worn"]})


def test_weights_that_are_not_at_hand_are_listed_with_the_reason(own_zoo, shapes, monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_ZOO", str(own_zoo))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    names = ["good", "test_resnet.r160_in1k"]
    found = zoo.rank_cards(recipe_for(shapes), among=names, say=lambda text: None)
    assert [row.name for row in found.rows] == ["good"]
    assert [one.name for one in found.unranked] == ["test_resnet.r160_in1k"]
    assert "its weights are not on this machine" in found.unranked[0].reason


def test_a_size_that_a_candidate_does_not_take_is_a_reason(own_zoo, shapes, tmp_path):
    import timm

    state = timm.create_model("mixer_s32_224", num_classes=10, img_size=64).state_dict()
    cards = cards_of(own_zoo, "good") | {
        "fixed": write_card(
            tmp_path / "fixed",
            state,
            arch="mixer_s32_224",
            input_size=[3, 64, 64],
            arch_kwargs={"img_size": 64},
        )
    }
    found = rank_backbones(recipe_for(shapes), cards)
    assert "does not take images of 32 px" in found.unranked[0].reason


def test_broken_files_are_left_out_or_stop_the_ranking(own_zoo, tmp_path):
    root = draw_shapes(tmp_path / "set", per_class=8)
    for path in sorted((root / "disc").iterdir())[:3]:
        path.write_bytes(path.read_bytes()[:200])
    found = rank_backbones(recipe_for(root, "data.split.test=0", "data.split.calibration=0"), cards_of(own_zoo, "good"))
    assert "cannot be read and were left out" in " ".join(found.warnings)
    with pytest.raises(DataError, match="cannot be read: disc/"):
        rank_backbones(recipe_for(root, "data.on_bad_image=fail", "data.split.test=0"), cards_of(own_zoo, "good"))


def test_what_cannot_be_ranked_is_said(own_zoo, shapes):
    with pytest.raises(RecipeError, match="random weights know nothing"):
        rank_backbones(recipe_for(shapes, "pretrained=false"), cards_of(own_zoo, "good"))
    with pytest.raises(BackboneError, match="no backbone to rank"):
        rank_backbones(recipe_for(shapes), {})
    with pytest.raises(RecipeError, match="no images are named"):
        rank_backbones(load_recipe(None, []), cards_of(own_zoo, "good"))


def test_filters_leave_what_they_name(own_zoo, monkeypatch):
    monkeypatch.setenv("FINETUNE_ZOO", str(own_zoo))
    assert {"good", "worn", "noise", "headless", default_backbone()} <= set(zoo.pick_cards())
    assert list(zoo.pick_cards(among=["worn", "good"])) == ["worn", "good"]
    assert list(zoo.pick_cards(licences=["mit"])) == ["worn"]
    assert list(zoo.pick_cards(licences=["cc-by"])) == ["noise"]
    assert set(zoo.pick_cards(licences=["cc-by", "mit"])) == {"noise", "worn"}
    assert set(zoo.pick_cards(max_params=0.6)) == {"noise", "worn"}
    assert list(zoo.pick_cards(max_params=0.6, licences=["MIT"])) == ["worn"]


def test_an_exact_licence_does_not_take_longer_names_along(own_zoo, monkeypatch):
    cards = cards_of(own_zoo, "good", "worn") | {
        "third": replace(read_card(own_zoo / "worn" / "card.yaml"), name="third")
    }
    cards["third"] = replace(cards["third"], licence="MIT-0")
    monkeypatch.setattr(zoo, "read_zoo", lambda: cards)
    assert list(zoo.pick_cards(licences=["MIT"])) == ["worn"]
    assert list(zoo.pick_cards(licences=["MI"])) == ["worn", "third"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"among": ["goood"]}, "Nearest: good"),
        ({"licences": ["aapache-2.0"]}, "no backbone has 'aapache-2.0'; there are .*Nearest: Apache-2.0"),
        ({"max_params": 0.1}, "leaves no backbone; the smallest is noise with 0.4 million"),
    ],
)
def test_a_filter_that_leaves_nothing_says_what_there_is(own_zoo, monkeypatch, words, message):
    monkeypatch.setenv("FINETUNE_ZOO", str(own_zoo))
    with pytest.raises(BackboneError, match=message):
        zoo.pick_cards(**words)


def test_sizes_that_no_card_names_are_counted(own_zoo, monkeypatch):
    cards = cards_of(own_zoo, "good", "noise")
    monkeypatch.setattr(zoo, "read_zoo", lambda: {name: replace(card, params_m=None) for name, card in cards.items()})
    assert list(zoo.pick_cards(max_params=0.5)) == ["noise"]


def test_the_recipes_own_backbone_wins_without_a_look(shapes):
    assert choose_backbone(recipe_for(shapes, "backbone=resnet18")) == ("resnet18", None)
    assert choose_backbone(recipe_for(shapes, "pretrained=false")) == (default_backbone(), None)


def test_one_card_at_hand_needs_no_ranking(shapes, monkeypatch):
    monkeypatch.delenv("FINETUNE_ZOO", raising=False)
    monkeypatch.setattr(ranking_module, "read_zoo", lambda: {"x": read_zoo()[default_backbone()]})
    assert choose_backbone(recipe_for(shapes)) == ("x", None)


def test_a_null_backbone_takes_the_first_of_the_ranking(own_zoo, shapes, monkeypatch):
    monkeypatch.setattr(ranking_module, "read_zoo", lambda: cards_of(own_zoo, "noise", "good"))
    name, found = choose_backbone(recipe_for(shapes))
    assert (name, found.chosen, found.rows[0].name) == ("good", "good", "good")


def row_of(name, hits, *, knn, logme, leep, n=100, shift=0):
    share = Proportion(value=hits / n, low=0, high=1, n=n)
    row = RankRow(
        name=name, is_tied=True, behind=Measure(value=0, low=0, high=0, n=n), probe=share,
        neighbours=share.model_copy(update={"value": knn}), logme=logme, h_score=1.0, leep=leep, milliseconds=1.0,
        megabytes=1.0, params_m=1.0, num_features=8, image_size=32, source_size=32, pretrained_on="x", licence="y",
        taken_for=(("a", "b", 0.5),) if leep is not None else (),
    )  # fmt: skip
    return Seen(row=row, right=(torch.arange(n) + shift) % n < hits, log_loss=0.5, hits=0, misses=n)


def test_among_ties_the_mean_z_score_decides_and_outside_them_it_does_not():
    seen = [
        row_of("first", 90, knn=0.7, logme=0.1, leep=-0.4),
        row_of("second", 88, knn=0.8, logme=0.2, leep=-0.2),
        row_of("far", 40, knn=0.99, logme=0.9, leep=-0.1),
    ]
    rows = order_rows(seen)
    assert [row.name for row in rows] == ["second", "first", "far"]
    assert rows[0].tie_score == pytest.approx(1)
    assert rows[1].tie_score == pytest.approx(-1)
    why = explain(rows, 100)
    assert "z-scores of k-NN, LogME and LEEP decides: second +1.00 and first -1.00" in why
    assert "The source classes of far tell these best (LEEP), but its probe is 50.0 points behind the best" in why


def test_a_clear_winner_needs_no_other_measure():
    rows = order_rows([row_of("low", 50, knn=0.9, logme=0.9, leep=None), row_of("top", 90, knn=0, logme=0, leep=None)])
    assert [row.name for row in rows] == ["top", "low"]
    assert "every other is behind by more than chance" in explain(rows, 100)


def test_a_measure_that_is_the_same_for_all_decides_nothing():
    assert mean_z_scores([[1.0, 3.0], [1.0, 5.0]]) == pytest.approx([-0.5, 0.5])


def test_the_command_speaks_json_and_text(own_zoo, shapes, monkeypatch):
    monkeypatch.setenv("FINETUNE_ZOO", str(own_zoo))
    words = ["zoo", "rank", str(shapes), "data.image_size=32", "--among", "good,worn,noise", "--max-params", "0.98"]
    done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    found = Ranking.model_validate(json.loads(done.stdout))
    assert found.chosen == "good"
    assert len(found.rows) == 3
    text = CliRunner().invoke(app, [*words, "--licence", "apache, mit"], catch_exceptions=False).stdout
    assert "Ranking of 2 backbones on" in text
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[-1].strip()


@pytest.mark.technique("T002")
@pytest.mark.shared
def test_ants_against_bees_are_known_to_the_insect_backbone(shared, monkeypatch):
    monkeypatch.setenv("FINETUNE_ZOO", str(shared / "zoo"))
    names = [f"mobilenetv2_100.{name}" for name in ("imagenet_keras", "imagenet_slim", "inat_bird", "inat_insect")]
    recipe = load_recipe(None, [f"data.root={shared / 'data' / 'ants_bees'}", "data.image_size=96"])
    found = zoo.rank_cards(recipe, among=names, say=lambda text: None)
    assert found.chosen == "mobilenetv2_100.inat_insect"
    rows = {row.name.rpartition(".")[2]: row for row in found.rows}
    assert found.rows[-1].name == names[2]
    assert not rows["inat_bird"].is_tied
    assert rows["inat_insect"].leep == max(row.leep for row in found.rows)
    taken = {own: source for own, source, _ in rows["inat_insect"].taken_for}
    assert "Ant)" in taken["ants"]
    assert "Bee)" in taken["bees"]
    assert any("Bee" in name for name, _ in rows["inat_insect"].response.named)
    assert all("ummingbird" in name or "inch" in name for _, name, _ in rows["inat_bird"].taken_for)
    assert taken["ants"] in found.why
