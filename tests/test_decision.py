import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from made_profiles import make_profile, share
from made_scores import make_scores, split_scores

from finetune.config.facts import ChiralityFacts, Facts, ProbeFacts, ShiftFacts, SimilarityFacts
from finetune.config.measures import Measure
from finetune.config.plan import Advice, Plan, Reason
from finetune.config.reading import load_recipe
from finetune.config.recipe import TrainSpec
from finetune.planning.advisor import UNMEASURED
from finetune.planning.matrix import ORDER, Place, choose_at
from finetune.planning.planner import make_plan as plan_of
from finetune.reporting.decision import ForecastRow, decide, depth_figure, forecast_rows, shift_figure
from finetune.reporting.grid_text import grid_text
from finetune.reporting.html import render_report
from finetune.reporting.matrix_figure import COLUMNS, ROWS, grid_figure
from finetune.reporting.text import facts_text, forecasts_text, plan_text, profile_text
from finetune.reporting.wording import (
    chirality_sentence,
    depth_sentence,
    duration,
    measure_rows,
    memory,
    similarity_rows,
)
from finetune.runs.folder import RunFolder

NASTY = '<b>&"'


def make_advice(images=38.0, similarity=0.62, *, half=0.09, small_below=100.0, similar_from=0.75, **changes):
    low, high = max(0.0, similarity - half), min(1.0, similarity + half)
    forecast = {"memory_mb": 310.0, "is_gain_known": True}
    known = {
        "cell": "small, different",
        "images_per_class": images,
        "similarity": similarity,
        "similarity_low": low,
        "similarity_high": high,
        "small_below": small_below,
        "similar_from": similar_from,
        "probe_error": 0.12,
        "prefer": "balanced",
        "strategy": "partial",
        "runner_up": "full",
        "why": "38 training images per class (< 100), similarity 0.62 (< 0.75): little data, different from the source",
        "forecasts": [
            {"strategy": "probe", "gain": 0.0, "gain_low": 0.0, "gain_high": 0.0, "seconds": 0.4} | forecast,
            {"strategy": "partial", "gain": 0.021, "gain_low": -0.004, "gain_high": 0.046, "seconds": 41} | forecast,
            {"strategy": "full", "gain": 0.018, "gain_low": -0.012, "gain_high": 0.049, "seconds": 192} | forecast,
            {"strategy": "adapter", "gain": 0.011, "gain_low": -0.02, "gain_high": 0.04, "seconds": 7200}
            | {"memory_mb": 2400.0, "is_gain_known": False},
        ],
    }
    return Advice.model_validate({**known, **changes})


def make_shift(values=(0.9, 0.31, 0.22, 0.44, 1.2), *, stages=None):
    names = stages or ["stem", *(f"blocks.{i}" for i in range(1, len(values)))]
    spread = Measure(value=0.4, low=0.3, high=0.5, n=300)
    return tuple(
        ShiftFacts(stage=name, spread=spread, mean=Measure(value=v, low=0.8 * v, high=1.25 * v, n=300))
        for name, v in zip(names, values, strict=True)
    )


def make_facts(**changes):
    """Facts as the survey writes them, with a whole decision in them."""
    response = {"num_classes": 1000, "named": [["daisy", 0.31], ["bee", 0.12], ["pot", 0.08]]}
    response["effective"] = {"value": 38.2, "low": 31.0, "high": 45.0, "n": 300}
    response["confidence"] = {"value": 0.41, "low": 0.38, "high": 0.44, "n": 300}
    response["energy"] = {"value": -9.1, "low": -9.4, "high": -8.8, "n": 300}
    similarity = {"value": 0.62, "low": 0.53, "high": 0.71, "control": share(0.38), "shift": make_shift()}
    similarity |= {"response": response, "frechet": 4.21, "emd": 0.61}
    known = {
        "chance": 0.2,
        "probe": ProbeFacts(val=share(0.88), train=share(0.9), log_loss=0.3, l2=1e-3, l2_at_edge=False),
        "profile": make_profile(),
        "similarity": similarity,
        "chirality": ChiralityFacts(share=share(0.51, 0.05, n=350), is_safe=True),
    }
    return make_bare_facts(**{**known, **changes})


def make_plan(facts=None, *wishes, **changes):
    """A plan that was made of the facts, with this advice or its own."""
    recipe = load_recipe(None, ["train.strategy=partial", "data.split.refit=false", *wishes])
    plan = plan_of(recipe, facts or make_facts())
    return plan.model_copy(update={"advice": make_advice(), "reasons": (), **changes})


def make_bare_facts(**changes):
    """Facts as the survey writes them, with a decision in them or without."""
    machine = {"device": "cpu", "cores": 2, "has_bf16": False, "has_fp16": False}
    backbone = {"name": "tiny", "params_m": 0.4, "num_features": 64, "stages": ["stem", "top"], "input_size": 64}
    backbone |= {"pretrained_on": "x", "licence": "mit", "has_batch_norm": True, "weights_digest": "a"}
    view = {"size_pixels": 64, "shorter_pixels": 64, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    counts = {"train": [30, 30], "val": [10, 10], "calibration": [5, 5], "test": [10, 10]}
    return Facts.model_validate(
        {"root": "flowers", "kind": "folders", "classes": ["daisy", "rose"], "counts": counts}
        | {"num_images": 110, "split_digest": "b", "median_width": 64, "median_height": 64, "backbone": backbone}
        | {"images_per_class": {"min": 30, "median": 30, "max": 30}, "view": view, "crop_pct": 1.0}
        | {"normalize": "weights", "chance": 0.5, "majority": 0.5, "machine": machine}
        | changes
    )


def page_of(folder, facts, plan):
    run = RunFolder(folder)
    run.write_json("facts.json", facts.model_dump(mode="json"))
    run.write_json("scores.json", make_scores(split_scores(0.9, 50)).model_dump(mode="json"))
    run.write_text("plan.yaml", plan.to_yaml())
    return render_report(folder)


def elements(drawing, tag):
    root = ElementTree.fromstring(str(drawing))
    return [part for part in root.iter() if part.tag == tag]


def reach(text):
    """Corners of a text, its letters taken for 6 units wide, turned as it says."""
    x, y, columns = float(text.get("x")), float(text.get("y")), len(text.text or "")
    width = 6.0 * columns
    start = {"start": 0.0, "middle": -width / 2, "end": -width}[text.get("text-anchor")]
    turned = re.match(r"rotate\((-?\d+) ([\d.]+) ([\d.]+)\)", text.get("transform") or "")
    angle = math.radians(float(turned[1])) if turned else 0.0
    for along in (start, start + width):
        for up in (-9.0, 0.0):
            yield x + along * math.cos(angle) - up * math.sin(angle), y + along * math.sin(angle) + up * math.cos(angle)


def places(drawing):
    """Every point that the marks of a drawing reach."""
    for part in ElementTree.fromstring(str(drawing)).iter():
        number = {key: float(value) for key, value in part.attrib.items() if re.fullmatch(r"-?[\d.]+", value)}
        if part.tag == "text":
            yield from reach(part)
        elif part.tag == "line":
            yield from ((number["x1"], number["y1"]), (number["x2"], number["y2"]))
        elif part.tag == "rect":
            assert number["width"] >= 0 and number["height"] >= 0
            yield from ((number["x"], number["y"]), (number["x"] + number["width"], number["y"] + number["height"]))
        elif part.tag == "circle":
            yield from ((number["cx"] + sign * number["r"], number["cy"] + sign * number["r"]) for sign in (-1, 1))
        elif part.tag in ("polyline", "polygon"):
            yield from (tuple(map(float, place.split(","))) for place in part.get("points").split())


def assert_inside(drawing):
    assert "nan" not in drawing and "inf" not in drawing
    _, _, width, height = map(float, ElementTree.fromstring(str(drawing)).get("viewBox").split())
    found = list(places(drawing))
    assert found
    for x, y in found:
        assert -1 <= x <= width + 1 and -1 <= y <= height + 1, (x, y, width, height)


def dot(drawing):
    (circle,) = elements(drawing, "circle")
    return float(circle.get("cx")), float(circle.get("cy"))


def test_the_dot_moves_by_the_logarithm_of_images_and_by_similarity():
    one, ten, hundred = (dot(grid_figure(make_advice(images, 0.5)))[0] for images in (1, 10, 100))
    assert ten - one == pytest.approx(hundred - ten, abs=0.2) and ten > one + 20
    low, middle, high = (dot(grid_figure(make_advice(30, value)))[1] for value in (0.0, 0.5, 1.0))
    assert low - middle == pytest.approx(middle - high, abs=0.2) and low > middle + 20


def test_the_bar_ends_where_the_interval_ends():
    drawing = grid_figure(make_advice(30, 0.5, half=0.2))
    (bar,) = [line for line in elements(drawing, "line") if line.get("class") == "whisker s1"]
    ends = [dot(grid_figure(make_advice(30, value)))[1] for value in (0.7, 0.3)]
    assert [float(bar.get("y1")), float(bar.get("y2"))] == pytest.approx(ends, abs=0.11)
    assert float(bar.get("x1")) == pytest.approx(dot(drawing)[0])


def at_place(images, similarity, *, probe_error=0.12, prefer="balanced"):
    return make_advice(images, similarity, probe_error=probe_error, prefer=prefer)


@pytest.mark.parametrize("prefer", ["accuracy", "balanced", "speed"])
@pytest.mark.parametrize("probe_error", [0.02, 0.06, 0.15, 0.5])
@pytest.mark.parametrize("images", [0, 1, 5, 38, 99, 900, 3e6])
@pytest.mark.parametrize("similarity", [0.0, 0.33, 0.74, 1.0])
def test_the_picture_never_says_another_strategy_than_the_advice(images, similarity, probe_error, prefer):
    place = Place(images, similarity, probe_error)
    chosen = choose_at(place, prefer)
    drawing = grid_figure(at_place(images, similarity, probe_error=probe_error, prefer=prefer))
    assert_inside(drawing)
    assert drawing.split('aria-label="')[1].split('"')[0].endswith(f"takes {chosen}")
    (field,) = [rect for rect in elements(drawing, "rect") if rect.get("stroke")]
    assert field.get("class") == f"choice-{chosen}"
    (left, top), (x, y) = (float(field.get("x")), float(field.get("y"))), dot(drawing)
    assert (
        left - 1 <= x <= left + float(field.get("width")) + 1 and top - 1 <= y <= top + float(field.get("height")) + 1
    )
    advice = at_place(images, similarity, probe_error=probe_error, prefer=prefer)
    assert grid_text(advice).endswith(f"o these data: {chosen}")


def test_every_field_of_the_picture_is_what_the_matrix_takes_there():
    drawing = grid_figure(at_place(20, 0.5))
    rects = [rect for rect in elements(drawing, "rect") if float(rect.get("y")) > 40]
    assert len(rects) == COLUMNS * ROWS
    across, down = ([float(rect.get(key)) for rect in rects] for key in ("x", "y"))
    left, right, low, high = min(across), max(across), min(down), max(down)
    for rect in rects:
        if rect.get("stroke"):
            continue
        column = round((COLUMNS - 1) * (float(rect.get("x")) - left) / (right - left))
        row = round((ROWS - 1) * (float(rect.get("y")) - low) / (high - low))
        place = Place(10 ** (4 * (column + 0.5) / COLUMNS), 1 - (row + 0.5) / ROWS, 0.12)
        assert rect.get("class") == f"choice-{choose_at(place)}"


@pytest.mark.parametrize(("small_below", "similar_from"), [(5, 0.9), (12, 0.2), (2000, 0.5), (1, 0.0), (100, 1.0)])
def test_the_borders_stand_where_the_advice_has_them(small_below, similar_from):
    at = dot(grid_figure(make_advice(small_below, similar_from, small_below=small_below, similar_from=similar_from)))
    drawing = grid_figure(make_advice(30, 0.5, small_below=small_below, similar_from=similar_from))
    upright, level = [line for line in elements(drawing, "line") if line.get("class") == "stage"]
    assert float(upright.get("x1")) == float(upright.get("x2")) == pytest.approx(at[0], abs=0.11)
    assert float(level.get("y1")) == float(level.get("y2")) == pytest.approx(at[1], abs=0.11)


@pytest.mark.parametrize("key", ["images_per_class", "similarity", "small_below", "similar_from", "probe_error"])
def test_an_unknown_place_draws_no_grid(key):
    assert grid_figure(make_advice().model_copy(update={key: float("nan")})) == ""


def curve(drawing, number):
    lines = elements(drawing, "polyline")
    (line,) = [part for part in lines if part.get("class").endswith(f"s{number}")]
    return [tuple(map(float, place.split(","))) for place in line.get("points").split()]


def test_points_rise_with_accuracy_from_the_stem_to_the_top():
    values = (0.42, 0.61, 0.83, 0.91, 0.88)
    probe = curve(depth_figure(make_profile(values), reference=("chance", 0.2)), 0)
    assert [x for x, _ in probe] == sorted(x for x, _ in probe)
    assert sorted(range(5), key=lambda i: -probe[i][1]) == sorted(range(5), key=lambda i: values[i])
    slope = [(probe[i][1] - probe[0][1]) / (values[i] - values[0]) for i in range(1, 5)]
    assert max(slope) - min(slope) < 1.5 and max(slope) < 0


def test_the_three_probes_and_chance_are_drawn_on_one_scale():
    drawing = depth_figure(make_profile((0.5, 0.8)), reference=("chance", 0.3))
    heights = [curve(drawing, number)[1][1] for number in range(3)]
    assert heights == sorted(heights)
    share_height = (heights[2] - heights[0]) / 0.12
    assert heights[1] - heights[0] == pytest.approx(0.05 * share_height, abs=0.2)
    chance = next(line for line in elements(drawing, "line") if line.get("class") == "stage")
    assert float(chance.get("y1")) - heights[0] == pytest.approx(0.5 * share_height, abs=0.9)
    assert "chance" not in depth_figure(make_profile((0.5, 0.8)))


def test_the_band_holds_the_probe():
    drawing = depth_figure(make_profile())
    (band,) = elements(drawing, "polygon")
    edge = [tuple(map(float, place.split(","))) for place in band.get("points").split()]
    probe = curve(drawing, 0)
    for (_, high), (_, middle), (_, low) in zip(edge[:5], probe, reversed(edge[5:]), strict=True):
        assert high < middle < low


def test_the_best_depth_is_named():
    drawing = depth_figure(make_profile())
    assert "best: blocks.3, 91.0 %" in [text.text for text in elements(drawing, "text")]
    mark = next(line for line in elements(drawing, "line") if line.get("class") == "stage")
    assert float(mark.get("x1")) == pytest.approx(curve(drawing, 0)[3][0], abs=0.1)


LONG = [f"features.a_rather_long_name.{i}.conv" for i in range(48)]


@pytest.mark.parametrize("num_stages", [1, 2, 5, 16, 48])
@pytest.mark.parametrize("value", [0.0, 0.004, 0.5, 0.996, 1.0])
@pytest.mark.parametrize("chance", [None, 0.0, 0.001, 1.0])
def test_any_number_of_stages_stays_inside_its_frame(num_stages, value, chance):
    drawing = depth_figure(
        make_profile([value] * num_stages, stages=LONG[:num_stages]),
        reference=None if chance is None else ("chance", chance),
    )
    assert_inside(drawing)
    assert len(elements(drawing, "polyline")) == (3 if num_stages > 1 else 0)
    assert len(elements(drawing, "circle")) == 3 * num_stages


def test_turned_names_keep_apart_and_keep_their_ends():
    drawing = depth_figure(make_profile([0.5] * 16, stages=LONG[:16]))
    shown = [text for text in elements(drawing, "text") if text.get("transform")]
    assert len({text.text for text in shown}) == 16
    assert all(re.match(r"…[^…._]", text.text) for text in shown)
    across = [float(text.get("x")) for text in shown]
    assert min(b - a for a, b in pairwise(across)) * 0.64 > 12  # sine of the angle


def test_bars_grow_with_the_shift_and_whiskers_hold_their_ends():
    drawing = shift_figure(make_shift((0.4, 0.8, 0.0)))
    wide = [float(rect.get("width")) for rect in elements(drawing, "rect") if rect.get("class") == "bar"]
    assert wide[1] == pytest.approx(2 * wide[0], abs=0.2) and wide[2] == 0
    starts = {float(rect.get("x")) for rect in elements(drawing, "rect")}
    (start,) = starts
    tips = [line for line in elements(drawing, "line") if line.get("y1") == line.get("y2")]
    assert float(tips[0].get("x1")) == pytest.approx(start + 0.8 * wide[0], abs=0.2)
    assert float(tips[0].get("x2")) == pytest.approx(start + 1.25 * wide[0], abs=0.2)


@pytest.mark.parametrize("values", [(0.0,), (1e6,), (1e-9, 3.0), (0.0, 0.0), tuple(range(48))])
def test_any_shift_stays_inside_its_frame(values):
    drawing = shift_figure(make_shift(values, stages=LONG[: len(values)]))
    assert_inside(drawing)
    assert len(elements(drawing, "rect")) == 2 * min(24, len(values))


def test_without_batch_norm_there_are_no_bars():
    assert shift_figure(()) == ""


def test_forecasts_read_like_prose():
    rows = {row.strategy: row for row in forecast_rows(make_advice())}
    nothing = {"gain": "0", "interval": "", "seconds": "0.4 s", "memory": "310 MB", "mark": ""}
    assert rows["probe"] == ForecastRow(strategy="probe", **nothing)
    assert (rows["partial"].gain, rows["partial"].interval) == ("+2.1", "−0.4 to +4.6")
    assert [row.seconds for row in rows.values()] == ["0.4 s", "41 s", "3.2 min", "2.0 h"]
    assert [row.mark for row in rows.values()] == ["", "chosen", "runner-up", "gain not measured"]
    assert (rows["adapter"].gain, rows["adapter"].interval, rows["adapter"].memory) == ("–", "", "2.4 GB")


def test_a_strategy_that_the_recipe_chose_is_not_called_advised():
    assert [row.mark for row in forecast_rows(make_advice(), chosen="probe")] == [
        "chosen",
        "advised",
        "runner-up",
        "gain not measured",
    ]
    why = decide(make_facts(), make_plan(None, "train.strategy=probe")).why
    assert why.endswith("different from the source. The advice is partial; the recipe says probe.")
    named = (Reason(key="train.strategy", value="partial", why="the recipe says so"),)
    why = decide(make_facts(), make_plan(reasons=named)).why
    assert why.endswith("The advice is partial, and the recipe says so.")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.01, "0.1 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1.0 min"),
        (3596, "59.9 min"),
        (3599, "1.0 h"),
        (172_000, "47.8 h"),
        (173_000, "2.0 days"),
        (None, "–"),
    ],
)
def test_times_change_unit_before_they_grow_long(seconds, words):
    assert duration(seconds) == words


def test_memory_is_told_in_megabytes_or_gigabytes():
    assert [memory(v) for v in (0, 310.2, 999.4, 999.6, 12_345.0, None)] == [
        "0 MB",
        "310 MB",
        "999 MB",
        "1.0 GB",
        "12.3 GB",
        "–",
    ]


@pytest.mark.parametrize(("lead", "error"), [(0.03, 0.01), (0.01, 0.01), (0.01, 0.03), (0.0, 0.0)])
@pytest.mark.parametrize("values", [(0.4, 0.9, 0.8), (0.4, 0.8, 0.9), (0.9,)])
def test_an_earlier_depth_leads_where_the_facts_say_so(values, lead, error):
    profile = make_profile(values, lead=lead, lead_error=error)
    is_earlier = profile.earlier is not None
    assert ("told better by earlier features" in depth_sentence(profile)) == is_earlier


def test_a_lead_within_its_error_is_not_claimed():
    said = depth_sentence(make_profile(lead=0.01, lead_error=0.02))
    assert "1.0 points (standard error 2.0), too little to tell from chance: the top serves as well." in said
    assert said.endswith("Measured on 1,900 training images, the logistic probe judged by cross-validation.")


def test_every_measure_of_similarity_is_told():
    rows = dict(measure_rows(make_facts()))
    assert list(rows) == [
        "Similarity",
        "Separability",
        "Random weights",
        "Batch norm",
        "Source classes",
        "Distance",
        "Earth mover",
    ]
    assert rows["Similarity"].startswith("0.62 (0.53 to 0.71);")
    assert "gets 88.0 % (85.0–91.0) of the val images right; chance is 20.0 %" in rows["Separability"]
    assert "in blocks.4: squared, by 1.20 (0.96 to 1.50)" in rows["Batch norm"]
    assert "over 38.2 (31.0 to 45.0) of 1,000; most often daisy (31.0 %), bee (12.0 %)" in rows["Source classes"]


def test_measures_that_are_not_there_give_no_row():
    found = SimilarityFacts(value=0.5, low=0.4, high=0.6)
    assert [name for name, _ in similarity_rows(found)] == ["Similarity"]
    assert measure_rows(make_facts(similarity=None)) == similarity_rows(None) == []


@pytest.mark.parametrize(
    ("is_safe", "value", "words"),
    [
        (True, 0.51, "Mirroring goes unnoticed: the original was named in 51.0 %"),
        (False, 0.87, "Mirroring shows: the original was named in 87.0 %"),
        (None, 0.6, "Whether mirroring shows cannot be said yet"),
        (False, 0.5, "The images show no side"),
    ],
)
def test_mirroring_is_judged_in_a_sentence(is_safe, value, words):
    sided = (("left", "right"),) if value == 0.5 else ()
    said = chirality_sentence(ChiralityFacts(share=share(value), is_safe=is_safe, sided=sided))
    assert said.startswith(words)
    assert ("By their names, left and right are each other's mirror image." in said) == bool(sided)
    assert chirality_sentence(ChiralityFacts(share=None, is_safe=None)) == ""


def test_the_page_tells_the_whole_decision(tmp_path):
    page = page_of(tmp_path, make_facts(), make_plan())
    section = page.split('<section id="depth">')[1].split("</section>")[0]
    assert re.findall(r"<h[23]>(.*?)</h", section) == [
        "Why this depth",
        "What each strategy would give",
        "What each depth knows",
        "How far batch norm is moved",
        "Left and right",
    ]
    assert re.findall('<svg class="([^"]*)"', section) == ["quadrants", "wide", "bars"]
    assert '<a href="#depth">' in page and "Undefined" not in section and "None" not in section


@pytest.mark.parametrize(
    ("missing", "heading"),
    [
        ("profile", "What each depth knows"),
        ("chirality", "Left and right"),
        ("similarity", "How far batch norm is moved"),
    ],
)
def test_a_missing_part_leaves_no_heading(tmp_path, missing, heading):
    page = page_of(tmp_path, make_facts(**{missing: None}), make_plan())
    section = page.split('<section id="depth">')[1].split("</section>")[0]
    assert "Why this depth" in section and heading not in section
    assert not re.search(r"<(div|dl|p|figure|tbody)\b[^>]*>\s*</\1>", section)


def test_advice_without_forecasts_has_no_table(tmp_path):
    page = page_of(tmp_path, make_facts(), make_plan(advice=make_advice(forecasts=())))
    assert "What each strategy would give" not in page and 'class="quadrants"' in page


def test_random_weights_have_no_place_on_the_grid(tmp_path):
    advice = make_advice(why="the weights are random, so there is nothing to keep", forecasts=())
    page = page_of(tmp_path, make_bare_facts(), make_plan(pretrained=False, advice=advice))
    assert "The weights are random, so there is nothing to keep." in page and 'class="quadrants"' not in page


def test_names_are_text_and_never_markup(tmp_path):
    profile, shift = make_profile((0.4, 0.6), stages=[NASTY, f"{NASTY}2"]), make_shift((0.4, 0.6), stages=[NASTY, "b"])
    facts = make_facts(
        profile=profile, chirality=ChiralityFacts(share=share(0.5), is_safe=True, sided=[(NASTY, NASTY)])
    )
    response = facts.similarity.response.model_copy(update={"named": ((NASTY, 0.5),)})
    similarity = facts.similarity.model_copy(update={"shift": shift, "response": response})
    advice = make_advice(why=NASTY)
    forecast = advice.forecasts[0].model_copy(update={"strategy": NASTY})
    plan = make_plan(advice=advice.model_copy(update={"forecasts": (forecast,)}))
    for drawing in (depth_figure(profile), shift_figure(shift)):
        assert NASTY in [text.text for text in elements(drawing, "text")]
    page = page_of(tmp_path, facts.model_copy(update={"similarity": similarity}), plan)
    section = page.split('<section id="depth">')[1]
    assert "<b>&" not in section and "&lt;b&gt;&amp;" in section


def grid_lines(**place):
    text = grid_text(make_advice(**place))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 72 and len(lines) <= 14 and text.isascii()
    return lines[2:-3]


def test_the_o_moves_with_images_and_with_similarity():
    places = {}
    for images, similarity in ((3, 0.9), (300, 0.9), (3, 0.1)):
        lines = grid_lines(images=images, similarity=similarity, half=0.01)
        ((places[images, similarity]),) = [(i, line.index("o")) for i, line in enumerate(lines) if "o" in line]
    first, right, below = places.values()
    assert right[0] == first[0] and right[1] > first[1] + 20
    assert below[1] == first[1] and below[0] > first[0] + 5


def test_the_terminal_draws_the_interval_as_a_bar():
    lines = grid_lines(images=30, similarity=0.6, half=0.3)
    column = next(line.index("o") for line in lines if "o" in line)
    marked = [line[column] for line in lines]
    start, end = marked.index("|"), len(marked) - marked[::-1].index("|")
    assert set(marked[start:end]) == {"|", "o"} and end - start > 4


def test_the_terminal_names_every_sign_that_it_draws():
    text = grid_text(make_advice(images=30, similarity=0.6))
    key = text.splitlines()[-1]
    drawn = set("".join(grid_lines(images=30, similarity=0.6)[:-1])) & set(".+#")
    assert drawn and all(f"{sign} {name}" in key for sign, name in zip(".+#", ORDER, strict=True))


def test_the_terminal_leaves_out_what_is_not_known():
    unknown = make_advice(forecasts=()).model_copy(update={"similarity": float("nan")})
    assert grid_text(unknown) == forecasts_text(unknown) == ""


def test_forecasts_stand_in_columns():
    lines = forecasts_text(make_advice()).splitlines()
    assert len(lines) == 5 and "\n".join(lines).isascii() and max(map(len, lines)) <= 100
    assert re.split(r"\s{2,}", lines[2].strip()) == ["partial", "+2.1 [-0.4 to +4.6]", "41 s", "310 MB", "chosen"]
    ends = [line.index(time) + len(time) for line, time in zip(lines, ["time", "0.4 s", "41 s"], strict=False)]
    assert len(set(ends)) == 1


@pytest.mark.parametrize("values", [(0.42, 0.61, 0.83, 0.91, 0.88), (0.5,), (0.0, 1.0)])
def test_a_line_per_depth_has_a_bar_of_its_accuracy(values):
    lines = profile_text(make_profile(values)).splitlines()
    bars = [line.count("#") for line in lines if re.search(r"\]; [\d.]+; [\d.]+$", line)]
    assert bars == [round(30 * value) for value in values]
    (best,) = [line for line in lines if line.startswith("  *")]
    assert f"{100 * max(values):.1f} [" in best
    assert max(map(len, lines)) <= 100


def test_the_terminal_tells_all_facts_of_a_decision():
    found = make_facts(features={"hits": 1200, "misses": 3, "bytes": 12_300_000})
    text = facts_text(found)
    assert "similarity    0.62 [0.53, 0.71] (1: as the images" in text
    assert "control       On features of the same network, untrained, a probe gets 38.0 %" in text
    assert "mirroring     Mirroring goes unnoticed" in text
    assert "features      1,200 from the cache, 3 computed; 12 MB" in text
    assert "Depths, from the stem to the top" in text and text.isascii()


def test_the_terminal_tells_nothing_of_facts_that_are_not_there():
    text = facts_text(make_bare_facts())
    assert not re.search("similarity|control|mirroring|features  |Depths|None", text)


def test_mirrored_classes_reach_the_terminal():
    chirality = ChiralityFacts.model_validate(
        {"share": share(0.5), "is_safe": False, "sided": [["left hand", "right hand"]]}
    )
    assert "left hand and right hand are each" in facts_text(make_bare_facts(chirality=chirality))


@pytest.mark.parametrize("pretrained", [True, False])
def test_no_grid_is_drawn_where_nothing_was_measured(pretrained):
    advice = make_advice(cell=UNMEASURED)
    known = {"reasons": (), "stages": (), "advice": advice, "pretrained": pretrained}
    assert "Similarity, over" not in plan_text(Plan.model_construct(**known, train=TrainSpec(strategy="full")))


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_plan_ends_with_its_grid_and_forecasts(pretrained):
    known = {"reasons": (), "stages": (), "advice": make_advice(), "pretrained": pretrained}
    text = plan_text(Plan.model_construct(**known, train=TrainSpec(strategy="full")))
    assert ("Similarity, over training images per class" in text) == pretrained
    chosen, advised = (next(line for line in text.splitlines() if word in line) for word in ("chosen", "advised"))
    assert chosen.startswith("  full") and advised.startswith("  partial")
