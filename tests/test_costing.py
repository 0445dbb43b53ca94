"""What a run is said to cost beforehand."""

import pytest

from dhbe import networks, suspects
from dhbe.api import costing
from dhbe.defenses import FastDHBE
from dhbe.search.survey import Survey


def suspect(classes):
    return suspects.of(networks.build("resnet8", classes, (3, 16, 16)), (3, 16, 16))


@pytest.fixture(autouse=True)
def a_second_an_image(monkeypatch):
    monkeypatch.setattr(costing, "_timed", lambda *_: (1.0, 1))


def seconds(classes, what, **options):
    return costing.of(suspect(classes), what, "cpu", "fp32", **options).seconds


def test_a_scan_looks_at_few_of_many_classes_and_costs_no_more():
    assert seconds(100, Survey()) == seconds(300, Survey()) < 3 * seconds(10, Survey())


@pytest.mark.parametrize(("what", "options"), [(Survey(), {"twice": True}), (FastDHBE(), {})])
def test_what_searches_every_class_costs_more_with_every_class(what, options):
    assert seconds(300, what, **options) > 2 * seconds(100, what, **options)
