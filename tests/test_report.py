import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dhbe.errors import Refused
from dhbe.records import Battery, FormRates, Measures, ModelInfo, Reactivation, Record, Relearning
from dhbe.report import boxplot, chart, compared, framed, grid, line, render, verdict
from dhbe.report.names import placed

HOSTILE = "</style></title><script>alert(1)</script><img src=https://evil.test/x onerror='a()'>\"{{ 7*7 }} $\\frac$"
MODEL = {"path": "victim.pt", "sha256": "ab" * 32, "arch": "resnet8", "classes": 10, "input": (3, 32, 32)}
SUSPECT = Measures(
    acc=0.9917, asr=0.9943, asr_x4=0.9811, asr_x9=0.9722, asr_victim=0.9634, asr_all=0.9547, n=360, asr_n=320,
    signs={"reaction": 18.21},
)  # fmt: skip
CLEANED = Measures(acc=0.9833, asr=0.0312, asr_x4=0.0433, asr_x9=None, n=360, asr_n=316, signs={"agreement": 0.9721})


def record(**changes) -> Record:
    fields = {
        "kind": "erase",
        "model": ModelInfo(**MODEL, mean=(0.4914,), std=(0.2471,)),
        "defense": {"name": "dhbe", "alpha": 0.5, "patch": 5, "places": "sample", "dropout": False, "weights": [1, 2]},
        "data": "digits",
        "trigger": "badnets:3",
        "target": 9,
        "before": SUSPECT,
        "after": CLEANED,
        "seconds": 125,
        "iterations": 180,
        "device": "cpu",
        "precision": "fp32",
        "versions": {"torch": "2.13.0"},
        "seed": 41,
        "curve": [{"iteration": i, "distillation": 1 / (i + 1), "other": -i} for i in range(20)],
        "finished": "2025-01-31T12:00:00Z",
    }
    return Record(**(fields | changes))


LEFT = Battery(
    forms=[
        FormRates(form="", before=0.9943, after=0.0312),
        FormRates(form="opacity=0.5", before=0.5123, after=None),
        FormRates(form="scale=2", before=0.7234, after=0.2351),
    ],
    reactivation=Reactivation(epsilon=0.05, before=0.8111, after=0.1222, others_before=0.2333, others_after=0.1444),
    relearning=[Relearning(images=10, asr=0.3553, others=0.2666, acc=0.9777)],
    searched=180, n=181, forms_n=361,
)  # fmt: skip


class Page(HTMLParser):
    """Collects the text, the tags and the attributes of a page; fails where elements do not nest."""

    EMPTY = frozenset({"meta", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.open, texts = [], [], [], []
        self.handle_data = texts.append
        self.feed(html)
        assert not self.open
        self.text = " ".join(" ".join(texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_numbers_are_those_of_the_record():
    text = Page(render(record())).text
    assert "The trigger is suppressed" in text
    assert "(ASR) fell from 99.4% to 3.1% (95% interval 1.7 to 5.7%, on 316 images)." in text
    assert "0.8 points lower: 99.2% before, 98.3% after (95% interval 96.4 to 99.2%, on 360 images)." in text
    assert "Amplified ×4, the trigger leads 4.3% of the images to the target class." in text
    assert re.search(r"amplified ×9 Also in [a-z ]+\. 97\.2% 94\.\d to 98\.\d% —", text)
    assert "96.3% —" in text  # asr_victim
    assert "95.5% —" in text  # asr_all
    assert re.search(r"reaction Mean [^.]+\. Smaller is better\. 18\.21 —", text)
    assert re.search(r"agreement Share [^.]+\. — 0\.9721", text)
    for shown in (
        "alpha 0.5",
        "dropout false",
        "weights [1, 2]",
        "places sample",
        "Seed 41",
        "torch 2.13.0",
        "ab" * 32,
    ):
        assert shown in text
    assert "patches of 5 × 5 pixels" in text
    assert "2 min 5 s" in text


def test_what_is_left_is_drawn_row_by_row():
    text = Page(render(record(battery=LEFT))).text
    assert (
        "The form scale=2 has the largest effect on the cleaned model: it leads 23.5% of the images to the target class."
        in text
    )
    assert "as it is 99.4% 3.1% opacity=0.5 51.2% — scale=2 72.3% 23.5%" in text
    assert "by more than 0.05. Searched on 180 images, measured on 181 others." in text
    assert "target class 81.1% 12.2% other classes (median) 23.3% 14.4%" in text
    assert "10 35.5% 26.7% 97.8%" in text
    assert "What is left" not in Page(render(record())).text
    none = [each.model_copy(update={"after": None}) for each in LEFT.forms]
    bare = LEFT.model_copy(update={"forms": none, "reactivation": None, "relearning": []})
    text = Page(render(record(battery=bare))).text
    assert "classifies no image correctly, so no form of the trigger can be measured" in text
    assert "One small perturbation" not in text
    assert "Relearning" not in text


def test_without_data_nothing_is_claimed():
    before, after = Measures(signs=SUSPECT.signs), Measures(signs={"agreement": 0.9721, "reaction": 0.314})
    text = Page(render(record(data=None, trigger=None, target=None, before=before, after=after))).text
    assert "accuracy (ACC) and attack success rate (ASR) are unknown" in text
    assert "97.2% of cases" in text
    assert "0.314 on average, against 18.2 on the suspect model" in text
    assert "no proof of either" in text
    assert "suppressed" not in text


@pytest.mark.parametrize(
    ("before", "after", "tone"),
    [
        ({"acc": 0.9, "asr": 1.0}, {"acc": 0.9, "asr": 0.0}, "good"),
        ({"acc": 0.9, "asr": 1.0}, {"acc": 0.8, "asr": 0.0}, "caution"),
        ({"acc": 0.9, "asr": 1.0}, {"acc": 0.9, "asr": 0.0, "asr_x9": 0.5}, "caution"),
        ({"acc": 0.9, "asr": 1.0}, {"acc": 0.9, "asr": 0.95}, "bad"),
        ({"acc": 0.9, "asr": 0.15}, {"acc": 0.9, "asr": 0.06}, "good"),
        ({"asr": 0.01}, {"asr": 0.9}, "bad"),
        ({"asr": 0.01}, {"asr": 0.0}, "unknown"),
        ({"acc": 0.9}, {"acc": 0.9}, "unknown"),
        ({}, {"asr": 0.0}, "unknown"),
        ({}, {}, "unknown"),
    ],
)
def test_the_headline_follows_the_strongest_trigger(before, after, tone):
    assert verdict("erase", [Measures(**before), Measures(**after)]).tone == tone


def test_a_missing_rate_is_not_called_missing_data():
    said = " ".join(verdict("erase", [Measures(acc=0.9), Measures(acc=0.9, asr=0.0)]).sentences)
    assert "No data" not in said
    assert "was not measured both before and after" in said


def test_an_absurd_number_of_images_has_an_interval():
    text = Page(render(record(before=Measures(acc=1.0, n=2**63 - 1)))).text
    assert "100.0% 100.0 to 100.0%" in text


def test_a_score_shows_one_column():
    text = Page(render(record(kind="score", defense=None, after=None))).text
    assert "Measured: accuracy 99.2%, attack success rate 99.4%" in text
    assert "Cleaned" not in text


@pytest.mark.parametrize("with_data", [True, False])
def test_a_page_stands_alone_and_a_hostile_record_stays_text(with_data):
    hostile = record(
        model=ModelInfo(**MODEL | {"path": HOSTILE, "arch": HOSTILE}, mean=(0.5,), std=(0.5,), code=HOSTILE),
        defense={"name": HOSTILE, HOSTILE: HOSTILE, "patch": HOSTILE, "nested": [{"x": HOSTILE}]},
        attack={"name": HOSTILE},
        data=HOSTILE if with_data else None,
        trigger=HOSTILE,
        before=SUSPECT if with_data else Measures(signs={HOSTILE: 1.0}),
        battery=LEFT.model_copy(update={"forms": [FormRates(form=HOSTILE, before=1.0, after=1.0)]}),
        device=HOSTILE,
        precision=HOSTILE,
        versions={HOSTILE: HOSTILE},
        curve=[{"iteration": 0, HOSTILE: 1.0}, {"iteration": 1, HOSTILE: 2.0}],
        warnings=[HOSTILE],
    )
    html = render(hostile, {HOSTILE: b"\x89PNG", "samples": b"\x89PNG"})
    page = Page(html)
    # The same elements as in a page with harmless texts: nothing that the record says became markup.
    harmless = Record.model_validate_json(hostile.to_json().replace(escaped(HOSTILE), "calm"))
    calm = Page(render(harmless, {"calm": b"\x89PNG", "samples": b"\x89PNG"}))
    assert page.tags == calm.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in calm.attributes]
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "use"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("href", "xlink:href", "srcset", "data", "action")
        assert name != "src" or value.startswith("data:image/png;base64,")
    assert "url(" not in html
    assert "@import" not in html


def escaped(text: str) -> str:
    return json.dumps(text)[1:-1]


def test_equal_records_give_equal_pages():
    pictures = {"samples": grid(torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)))}
    again = Record.model_validate_json(record().to_json())
    assert render(record(), pictures) == render(again, pictures)


number = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**12), number), min_size=1, max_size=20))
def test_any_finite_curve_has_a_chart(points):
    svg = chart(points)
    assert "nan" not in svg
    assert "inf" not in svg
    assert Page(svg).tags[0] == "svg"


def test_a_chart_goes_through_its_points():
    """Points on a line stay on a line, in order, and the line spans the chart."""
    path = re.search(
        r'<path d="([^"]+)"[^>]*stroke: var\(--accent\)', chart([(0, 1.0), (10, 3.0), (30, 7.0), (40, 2.0)])
    )
    assert path
    x, y = np.array(re.findall(r"([\d.]+) ([\d.]+)", path[1]), dtype=float).T
    np.testing.assert_allclose((x - x[0]) / (x[-1] - x[0]), [0, 0.25, 0.75, 1], atol=1e-4)
    np.testing.assert_allclose((y - y[0]) / (y[2] - y[0]), [0, 2 / 6, 1, 1 / 6], atol=1e-4)


def test_a_chart_of_one_point_shows_it():
    assert re.search(r'<path d="M [^"]+ L? ?[^"]+"[^>]*stroke: var\(--accent\)', chart([(3, 1.0)]), flags=re.DOTALL)


def test_boxes_show_what_moved():
    boxes = {"logits_l1": (0.0, 1.0, 2.0, 3.0, 4.0), "features_l2": (0.0, 0.0, 0.0, 0.0, 0.0)}
    states = {"before": SUSPECT.model_copy(update={"activations": boxes}), "after": CLEANED}
    page = Page(render(record(**states)))
    assert "What the trigger moves" in page.text
    assert page.text.count("logits_l1") == 1
    assert "What the trigger moves" not in render(record())


@given(st.lists(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 5), min_size=1, max_size=4))
@settings(max_examples=10, deadline=None)
def test_any_finite_boxes_have_a_plot(boxes):
    svg = boxplot({f"<b>{number}": tuple(sorted(box)) for number, box in enumerate(boxes)})
    assert "<b>" not in svg
    assert svg.count("&lt;b&gt;") == len(boxes)


def test_a_grid_holds_every_image():
    images = torch.arange(5 * 3 * 4 * 6).view(5, 3, 4, 6).float() / 359
    picture = np.asarray(Image.open(io.BytesIO(grid(images, columns=3, scale=2))))
    assert picture.shape == (2 * 8 + 2, 3 * 12 + 2 * 2, 4)
    for i, image in enumerate(images):
        row, column = divmod(i, 3)
        tile = picture[row * 10 : row * 10 + 8, column * 14 : column * 14 + 12]
        assert (tile[..., 3] == 255).all()
        expected = np.rint(image.permute(1, 2, 0).numpy() * 255)
        for corner in (tile[::2, ::2], tile[1::2, 1::2]):
            np.testing.assert_array_equal(corner[..., :3], expected)
    assert (picture[10:, 28:, 3] == 0).all()  # there is no sixth image


def test_a_grid_of_grey_and_of_impossible_images():
    picture = np.asarray(Image.open(io.BytesIO(grid(torch.tensor([[[[-1.0, 0.5, 2.0, torch.nan]]]]), scale=1))))
    assert picture[0, :, :3].tolist() == [[0] * 3, [128] * 3, [255] * 3, [0] * 3]
    for shape in ((0, 3, 4, 4), (2, 2, 4, 4), (3, 4, 4)):
        with pytest.raises(Refused, match="a picture is drawn of images"):
            grid(torch.zeros(shape))


FOUND = Measures(signs={"suspected_class": 9, "anomaly_index": 11.8, "gain": 0.13, "agreement": 1.0})


@pytest.mark.parametrize(
    ("verdict", "doubt", "said", "tone"),
    [("erased", None, "erased: class 9 behaved like a target class (index 11.8); in the cleaned model the strongest trigger found leads 13.0%", "good"),
     ("nothing found", None, "nothing found: no class stood out (class 9 came closest", "unknown"),
     ("still answers", None, "still answers: class 9 behaved like a target class (index 11.8), and in the cleaned model the strongest trigger found still leads", "bad"),
     ("unclear", "give --mean cifar10", "unclear: give --mean cifar10", "caution"),
     ("label contradicted", "give --mean cifar10", "label contradicted: give --mean cifar10", "caution")],
)  # fmt: skip
def test_the_page_answers_first_and_says_what_the_terminal_says(verdict, doubt, said, tone):
    nothing = {"data": None, "trigger": None, "target": None}
    found = record(verdict=verdict, doubt=doubt, before=FOUND, after=Measures(signs={"agreement": 0.9}), **nothing)
    assert line(found).startswith(said)
    page = render(found)
    assert f'<section class="verdict {tone}">' in page
    assert said[1:] in Page(page).text.partition("Measured on real images")[0]


def test_signs_of_the_cleaned_model_stand_under_it():
    before, after = placed([FOUND.signs, {"agreement": 0.9}])
    assert "gain" not in before
    assert after == {"gain": 0.13, "agreement": 0.9}


def test_a_comparison_names_each_defence_with_its_rates():
    page = Page(compared(record().model, {"clp": record(), HOSTILE: record(verdict="no effect")}))
    assert "script" not in page.tags
    assert "clp: The trigger is suppressed" in page.text
    assert "The defence had no effect" in page.text
    assert page.text.count("98.3%") >= 2


def test_a_notebook_shows_the_page_in_a_frame_of_its_own():
    frame = Page(framed(record()))
    assert frame.tags == ["iframe"]
    assert dict(frame.attributes)["srcdoc"] == render(record())
