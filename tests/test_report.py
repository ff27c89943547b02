import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import jinja2
import numpy as np
import pytest
import torch
from made_facts import make_facts
from made_scores import against_probe, make_scores, split_scores
from PIL import Image

import finetune as ft
from finetune.config.facts import BadFile
from finetune.config.scores import AgainstProbe, ByRole, ClassScore, SplitScores
from finetune.errors import RunError
from finetune.metrics.calibration import fit_temperature, log_probabilities
from finetune.metrics.classification import score_predictions
from finetune.metrics.shares import wilson
from finetune.metrics.significance import answered_right
from finetune.planning.planner import make_plan
from finetune.reporting import svg
from finetune.reporting.html import (
    _template,
    confused_pairs,
    draw_curves,
    find_mistakes,
    plain,
    render_report,
    write_report,
)
from finetune.reporting.verdict import judge

FLOWERS = ("daisy", "dandelion", "rose", "sunflower", "tulip")
NASTY = '<b>&"'
VOID = {"meta", "br", "img"}


def share(right, n):
    return wilson(int(right), int(n))


def answers(labels, num_classes, *, strength, seed):
    noise = np.random.default_rng(seed)
    logits = noise.normal(size=(len(labels), num_classes))
    logits[np.arange(len(labels)), labels] += strength
    raised = np.exp(3.6 * logits)
    return (raised / raised.sum(1, keepdims=True)).astype(np.float32)


def write_curves(path):
    noise, step = np.random.default_rng(3), 0
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["stage", "epoch", "step", "name", "value"])
        for stage, rates in (("probe", {"head": 1e-2}), ("full", {"head": 1e-3, "backbone": 1e-4})):
            for epoch in range(10):
                step += 52
                age, wobble = step / 400, noise.normal(size=4)
                measured = {f"lr/{k}": v * (0.5 + 0.5 * np.cos(np.pi * epoch / 9)) for k, v in rates.items()} | {
                    "train/loss": 1.5 * np.exp(-age) + 0.05 + 0.01 * wobble[0],
                    "val/loss": 1.4 * np.exp(-age) + 0.17 + 0.02 * wobble[1],
                    "train/top1": min(1, 0.99 - 0.5 * np.exp(-age) + 0.004 * wobble[2]),
                    "val/top1": min(1, 0.95 - 0.45 * np.exp(-age) + 0.008 * wobble[3]),
                    "gradient_norm": 2.5 * np.exp(-age / 2) * np.exp(0.3 * wobble[0]),
                    "images_per_second": (412 if stage == "probe" else 96) + 4 * wobble[1],
                }
                rows.writerows([stage, epoch, step, name, f"{value:.6g}"] for name, value in measured.items())
        file.write("full,10,1092,train/lo")  # a run that was killed in the middle of a row


def make_run(folder, *, classes=FLOWERS, n=700, stages=2):
    """A run folder such as training leaves behind, numbers drawn from one seed."""
    folder.mkdir(parents=True)
    count, classes = len(classes), tuple(classes)
    labels = np.sort(np.random.default_rng(0).permutation(n) % count)
    names = np.array([f"{classes[label]}/image_{i:05d}.jpg" for i, label in enumerate(labels)])
    final = answers(labels, count, strength=2.9, seed=1)
    probe = answers(labels, count, strength=2.8, seed=2) if stages else final
    labels_, final_, probe_ = (torch.from_numpy(part) for part in (labels, final, probe))
    changes = {"temperature": fit_temperature(log_probabilities(final_), labels_), "classes": classes}
    if stages:
        changes["paired"] = answered_right(AgainstProbe, final_, probe_, labels_)
    test, beside = (score_predictions(said, labels_, classes) for said in (final_, probe_))
    scores = make_scores(test, probe=beside, **changes)
    counts = {"train": (380,) * count, "val": (82,) * count, "calibration": (0,) * count, "test": (n // count,) * count}
    facts = make_facts().model_copy(update={
        "root": "data/flowers",
        "classes": tuple(classes),
        "counts": counts,
        "num_images": 3670,
        "bad_images": (
            BadFile(name="rose/broken_0001.jpg", reason="truncated after 61 %"),
            BadFile(name="tulip/empty.png", reason="empty file"),
        ),
        "split_digest": "9f2c41d07be85a13",
        "warnings": ("3 pictures stand in two classes; all copies were set aside.",),
        "image_kinds": {"rgb": 3651, "grey": 12, "cmyk": 7},
        "rotated": 41,
        "chance": 1 / count,
        "majority": 0.245,
    })  # fmt: skip
    wish = ["name=flowers", f"train.strategy={'full' if stages else 'probe'}", "data.split.refit=false"]
    plan = make_plan(ft.load_recipe(None, wish), facts)
    environment = {"python": "3.11.9", "torch": "2.9.0", "device": "cpu", "threads": 2, "precision": "32-true"}
    for name, content in {"scores": scores.model_dump(), "facts": facts.model_dump(mode="json")}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    (folder / "plan.yaml").write_text(plan.to_yaml(), encoding="utf-8")
    np.savez(folder / "predictions.npz", test_probabilities=final, test_labels=labels, test_names=names)
    if stages:
        write_curves(folder / "curves.csv")
    return folder


def edit(folder, name, **changes):
    path = folder / name
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content), encoding="utf-8")


def drawn_image(name):
    stream, pixels = io.BytesIO(), np.random.default_rng(len(name)).integers(0, 255, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


class Nesting(HTMLParser):
    """Records every tag, and fails where one is closed that is not open."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "flowers-mobilenetv3-1")


@pytest.fixture(scope="module")
def page(run):
    return write_report(run, read_image=drawn_image).read_text(encoding="utf-8")


def numbers(value, n=153, *, difference=None, half=0.02, **counts):
    if difference is None:
        return make_scores(split_scores(value, n))
    paired = against_probe(difference, n, half=half, **counts)
    return make_scores(split_scores(value, n), probe=split_scores(value - difference, n), paired=paired)


def test_a_clear_gain_is_called_one():
    verdict = judge(numbers(0.954, difference=0.05), is_probe_only=False)
    assert verdict.tone == "better"
    assert verdict.headline == "95.4 % of 153 test images right (95 % interval 91.4–97.4)."
    assert verdict.comparison.startswith(
        "The probe alone gets 90.4 %; fine-tuning raised that by 5.0 points (+3.0 to +7.0)"
    )


def test_a_clear_loss_is_called_one():
    verdict = judge(numbers(0.9, difference=-0.05), is_probe_only=False)
    assert verdict.tone == "worse"
    assert "lowered that by 5.0 points (−7.0 to −3.0)" in verdict.comparison


def test_an_interval_across_zero_decides_nothing():
    verdict = judge(numbers(0.954, difference=0.013), is_probe_only=False)
    assert verdict.tone == "undecided"
    assert "changed that by +1.3 points (−0.7 to +3.3), so on this test set the difference" in verdict.comparison
    assert verdict.comparison.endswith(
        "cannot be told from chance: keep the probe, which is simpler, unless more images say otherwise."
    )


@pytest.mark.parametrize("edge", ["low", "high"])
def test_an_interval_that_touches_zero_decides_nothing(edge):
    scores = numbers(0.9, difference=0.02 if edge == "low" else -0.02, half=0.02)
    assert judge(scores, is_probe_only=False).tone == "undecided"


def test_same_answers_on_every_image_are_said_to_be_the_same():
    scores = numbers(0.9, difference=0.0, gained=0, fell=0)
    assert "exactly the same images" in judge(scores, is_probe_only=False).comparison


def test_a_probe_is_compared_with_nothing():
    verdict = judge(numbers(0.954, difference=0.0), is_probe_only=True)
    assert verdict.tone == "probe"
    assert "Nothing was fine-tuned" in verdict.comparison


def test_without_a_probe_no_gain_is_claimed():
    verdict = judge(numbers(0.954), is_probe_only=False)
    assert verdict.tone == "alone"
    assert "not known" in verdict.comparison


def test_without_scores_the_verdict_says_so():
    assert judge(make_scores(None), is_probe_only=False).tone == "none"


@pytest.mark.parametrize(("n", "is_cautious"), [(99, True), (100, False)])
def test_few_test_images_bring_a_caution(n, is_cautious):
    notes = " ".join(judge(numbers(0.9, n), is_probe_only=True).notes)
    assert ("read it as a sketch" in notes) == is_cautious


def test_validation_scores_are_called_optimistic():
    verdict = judge(make_scores(None, val=split_scores(0.9)), is_probe_only=True)
    assert "153 validation images" in verdict.headline
    assert any("optimistic" in note for note in verdict.notes)


def test_the_class_with_the_lowest_recall_is_named():
    rows = [ClassScore(name="ant", n=20, recall=share(19, 20)), ClassScore(name="bee", n=30, recall=share(24, 30))]
    rows.append(ClassScore(name="absent", n=0))

    def notes(*per_class):
        return judge(make_scores(split_scores(0.9, per_class=per_class)), is_probe_only=True).notes

    assert any("“bee”: 80.0 % of its 30 images" in note for note in notes(*rows))
    everything = [row.model_copy(update={"recall": share(9, 9)}) for row in rows[:2]]
    assert "Every image of every class was recognised." in notes(*everything)


def test_per_cent_never_rounds_up_to_perfect():
    assert [svg.percent(v) for v in (1.0, 0.99999, 0.954, None, float("nan"))] == [
        "100 %",
        "> 99.9 %",
        "95.4 %",
        "–",
        "–",
    ]
    assert svg.percent(0.99999, unit=False) == "100"  # the end of an interval may be rounded
    assert svg.points(-0.0001) == "+0.0"


def test_the_page_needs_nothing_but_itself(page):
    tags = Nesting(page)
    assert tags.open == []
    assert not {"script", "link", "iframe", "object", "use"} & {tag for tag, _ in tags.seen}
    addresses = [a[key] for _, a in tags.seen for key in ("src", "href") if key in a]
    assert addresses and all(a.startswith(("data:image/jpeg;base64,", "#")) for a in addresses)
    assert not re.search(r"https?://|@import|url\(", page)
    assert len(page.encode()) < 1_500_000


def test_every_section_of_a_full_run_is_there(page):
    anchors = [attrs["href"][1:] for tag, attrs in Nesting(page).seen if tag == "a"]
    assert anchors == ["scores", "plan", "depth", "curves", "confusion", "reliability", "mistakes", "data", "again"]
    assert all(f'<section id="{anchor}">' in page for anchor in anchors)
    for text in (
        "truncated after 61 %",
        "9f2c41d07be85a13",
        "3 pictures stand in two classes",
        "finetune evaluate",
        "trainable stages",
    ):
        assert text in page
    assert all(
        title in page for title in ("Loss", "Top-1 accuracy", "Learning rate", "Gradient norm", "Images per second")
    )


def test_the_page_names_the_weights_by_their_digest(page):
    assert make_facts().backbone.weights_digest in page


@pytest.mark.parametrize("use", ["{{ %s }}", "{%% if %s %%}{%% endif %%}", "{{ %s | plain }}"])
@pytest.mark.parametrize("name", ["facts.backbone.sha256", "scores.average", "scores.center.tets", "nothing"])
def test_a_name_that_nothing_bears_is_an_error_of_the_page(use, name):
    scores = make_scores(split_scores(), center=ByRole[SplitScores]())
    with pytest.raises(jinja2.UndefinedError, match=name.rpartition(".")[2]):
        _template().environment.from_string(use % name).render(facts=make_facts(), scores=scores)


def test_every_figure_has_a_name_for_those_who_cannot_see_it(page):
    drawings = [attrs for tag, attrs in Nesting(page).seen if tag == "svg"]
    assert len(drawings) > 10
    assert all(d["role"] == "img" and d["aria-label"] for d in drawings)


def test_the_page_depends_on_the_folder_alone(run, page):
    assert render_report(run, read_image=drawn_image) == page


def test_thumbnails_are_the_surest_mistakes_first(run, page):
    stored = np.load(run / "predictions.npz")
    found = find_mistakes(stored["test_probabilities"], stored["test_labels"], stored["test_names"], FLOWERS)
    sure = [m.probability for m in found]
    assert len(found) == 12 and sure == sorted(sure, reverse=True)
    assert all(m.truth != m.answer for m in found)
    assert page.count("data:image/jpeg;base64,") == 12
    assert page.index(found[0].name) < page.index(found[11].name)


def unreadable(name):
    raise OSError(name)


@pytest.mark.parametrize("reader", [None, unreadable, lambda name: b"no image"], ids=["none", "missing", "damaged"])
def test_an_image_that_cannot_be_read_leaves_its_row_standing(run, reader):
    page = render_report(run, read_image=reader)
    assert "data:image" not in page.split("</style>")[1]
    assert page.count(">no picture<") == 12


def sixteen_bits(name):
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(stream, "PNG")
    return stream.getvalue()


def test_a_16_bit_image_is_not_clipped_to_white(run):
    import base64

    encoded = re.search(r'data:image/jpeg;base64,([^"]+)"', render_report(run, read_image=sixteen_bits))
    assert encoded
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[1]))))
    assert abs(int(pixels.mean()) - 128) < 4


@pytest.mark.parametrize("num_others", [4, 30], ids=["matrix", "pairs"])
def test_names_are_text_and_never_markup(tmp_path, num_others):
    classes = [NASTY, *(f"class {i}" for i in range(num_others))]
    run = make_run(tmp_path / "run", classes=classes, n=350)
    edit(run, "facts.json", bad_images=[{"name": f"{NASTY}.jpg", "reason": NASTY}], warnings=[NASTY])
    body = render_report(run).split("</style>")[1]
    assert Nesting(body.replace("</head>", "", 1).replace("</html>", "", 1)).open == []
    assert "<b>&" not in body
    assert "&lt;b&gt;&amp;" in body


def test_a_figure_escapes_the_names_of_stages_and_series():
    series = svg.Series(name=NASTY, points=((NASTY, 0.0, 1.0), (NASTY, 900.0, 2.0)))
    panel = svg.line_panel([series], [(NASTY, 0.0, 900.0)], title=NASTY)
    ((_, attributes), *_) = Nesting(panel).seen
    assert attributes["aria-label"] == f"{NASTY} by step: {NASTY} from 1 to 2"
    assert "<b>" not in panel


def test_long_and_foreign_names_are_cut_in_figures_only(tmp_path):
    long, wide = "a" * 300, "向日葵の花" * 10
    page = render_report(make_run(tmp_path / "run", classes=(long, wide, "قرنفل"), n=120))
    labels = re.findall(r"<text[^>]*>([^<]*)", page)
    assert long in page and wide in page and "قرنفل" in labels
    assert max(len(label) for label in labels) < 60


def test_wide_characters_count_twice():
    assert svg.shorten("日本語日本語", 7) == "日本語…"
    assert svg.shorten("short", 5) == "short"


def test_a_probe_only_run_has_no_curves_and_no_second_column(tmp_path):
    page = render_report(make_run(tmp_path / "run", stages=0))
    assert "Nothing was fine-tuned" in page and 'id="curves"' not in page and "<th>Probe alone</th>" not in page


def test_many_classes_show_confused_pairs_and_keep_the_page_small(tmp_path):
    run = make_run(tmp_path / "run", classes=[f"species {i}" for i in range(300)], n=1500)
    page = render_report(run)
    assert 'class="matrix"' not in page and "most frequent confusions" in page
    assert "260 better classes" in page
    assert len(page) < 300_000


def test_pairs_are_counted_from_the_fullest_down():
    pairs = confused_pairs([[5, 1, 0], [7, 2, 0], [0, 3, 4]], ["a", "b", "c"])
    assert [(p.truth, p.answer, p.count, p.n) for p in pairs] == [
        ("b", "a", 7, 9),
        ("c", "b", 3, 7),
        ("a", "b", 1, 6),
    ]


@pytest.mark.parametrize("missing", ["curves.csv", "predictions.npz", "environment.json"])
def test_what_a_run_need_not_have_leaves_no_hole(tmp_path, missing):
    run = make_run(tmp_path / "run", n=50)
    (run / missing).unlink()
    page = render_report(run)
    assert "Undefined" not in page and "None" not in page.split("</style>")[1]


@pytest.mark.parametrize("test", [None, split_scores(0.9, 50)], ids=["no image was judged", "no probe, no sets"])
def test_a_run_with_few_scores_still_gives_a_page(tmp_path, test):
    run = make_run(tmp_path / "run", n=50)
    (run / "scores.json").write_text(json.dumps(make_scores(test, classes=FLOWERS).model_dump()))
    page = render_report(run)
    assert ("not scored on any image" if test is None else "90.0\u00a0% of 50 test images") in page
    assert "Undefined" not in page and "None" not in page.split("</style>")[1]


@pytest.mark.parametrize("name", ["scores.json", "facts.json", "plan.yaml"])
def test_a_missing_file_is_named(tmp_path, name):
    run = make_run(tmp_path / "run", n=50)
    (run / name).unlink()
    with pytest.raises(RunError, match=f"has no {name}.*finetune resume"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["scores.json", "facts.json", "plan.yaml", "predictions.npz"])
def test_a_damaged_file_is_named(tmp_path, name):
    run = make_run(tmp_path / "run", n=50)
    (run / name).write_bytes(b"{[")
    with pytest.raises(RunError, match=name):
        write_report(run)


def test_predictions_for_other_classes_are_refused(tmp_path):
    run = make_run(tmp_path / "run", n=50)
    edit(run, "scores.json", classes=["a", "b"])
    with pytest.raises(RunError, match=r"\(50, 5\) probabilities.*for 2 classes"):
        write_report(run)


def test_objects_in_predictions_are_refused(tmp_path):
    run = make_run(tmp_path / "run", n=50)
    np.savez(run / "predictions.npz", test_names=np.array([{}], dtype=object))
    with pytest.raises(RunError, match="damaged"):
        write_report(run)


def test_a_failed_write_leaves_the_old_report_and_no_draft(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", n=50)
    before = write_report(run).read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("finetune.runs.folder.os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".*"))


def test_bins_hold_every_image_and_its_hit():
    probabilities = np.array([[0.95, 0.05], [0.92, 0.08], [0.4, 0.6], [np.nan, np.nan], [1.0, 0.0]])
    low, high = svg.reliability_bins(probabilities, np.array([0, 1, 1, 0, 0]))
    assert (low.count, low.right, low.edges) == (1, 1.0, (0.6, 0.7))
    assert (high.count, high.right, high.low, high.high) == (3, 2 / 3, wilson(2, 3).low, wilson(2, 3).high)
    assert high.confidence == pytest.approx((0.95 + 0.92 + 1.0) / 3)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.913, 0.988), (0, 1040), (3e-5, 4e-5), (-2, 3)])
def test_ticks_are_few_and_inside(low, high):
    ticks = svg.nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert min(ticks) >= low - 1e-9 and max(ticks) <= high + 1e-9


def test_curves_of_two_stages_do_not_join_up(run):
    rate = next(panel for panel in draw_curves(run / "curves.csv") if "Learning rate" in panel)
    paths = re.findall(r'<path class="curve s0" d="M([^"]*)"', rate)
    assert [len(path.split()) for path in paths] == [10, 10]
    assert "probe" in rate and "full" in rate


def test_curves_survive_values_that_diverged_and_thin_long_runs(tmp_path):
    rows = [f"full,0,{step},train/loss,{'nan' if step % 7 == 0 else 1 / step}" for step in range(1, 5000)]
    (tmp_path / "curves.csv").write_text(
        "\n".join(["stage,epoch,step,name,value", *rows, "full,0,5000,train/loss,inf"])
    )
    (panel,) = draw_curves(tmp_path / "curves.csv")
    assert "nan" not in panel and "inf" not in panel
    assert len(panel) < 10_000


def test_values_of_a_plan_read_like_prose():
    values = [None, True, 1e-4, [1, "a"], [], "x" * 500]
    assert [plain(v) for v in values][:5] == ["–", "yes", "0.0001", "1, a", "none"]
    assert len(plain(values[5])) == 240


def test_reporting_needs_no_torch():
    code = "import sys, finetune.reporting.html; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
