from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from dhbe.bench import leaderboard

ROOT = Path(__file__).parents[1]
FETCHED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Links(HTMLParser):
    """Addresses that a page links to, those that it fetches by itself, and its own anchors."""

    def __init__(self, page):
        super().__init__()
        self.links, self.fetched, self.anchors = [], [], {""}
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.anchors |= {told[name] for name in ("id", "name") if told.get(name)}
        for name in ("href", "src"):
            if told.get(name) and told.get("rel") != "canonical":
                (self.fetched if (tag, name) in FETCHED else self.links).append(told[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built; a warning fails it."""
    build = pytest.importorskip("mkdocs.commands.build")
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its plugins
        build.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_no_page_links_to_what_is_not_there_or_fetches_from_elsewhere(site):
    pages = {page: Links(page) for page in site.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 10
    dead = []
    for page, found in pages.items():
        assert not [each for each in found.fetched if urlsplit(each).netloc], page
        for link in (*found.links, *found.fetched):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            goal = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            goal = goal / "index.html" if goal.is_dir() else goal
            known = goal.exists() and (goal not in pages or unquote(parts.fragment) in pages[goal].anchors)
            if not known and not parts.fragment.startswith("__"):
                dead.append((page.name, link))
    assert not dead


def test_the_site_has_a_reference_and_a_board_whose_cells_link_to_records(site):
    assert 'id="dhbe.api.erase"' in (site / "reference.html").read_text()
    board = Links(site / "leaderboard.html")
    cells = [link for link in board.links if link.startswith("records/")]
    assert len(cells) >= 20
    assert "dhbe bench run" in (site / "leaderboard.html").read_text()


def test_the_board_has_means_over_seeds_and_every_record():
    made = leaderboard.board(ROOT / "results")
    (cells,) = [found for where, found in made.items() if where.endswith("victims of the zoo")]
    cell = cells["neural-cleanse", "badnets-3"]
    assert len(cell.entries) == 3
    assert min(each.lost for each in cell.entries) <= cell.lost <= max(each.lost for each in cell.entries)
    assert (
        f"| [{cell.lost:.1f} / {cell.asr:.1f}](records/peers/badnets-3_neural-cleanse_0.json) (3) |"
        in leaderboard.page(made)
    )
    assert {file.parent.name for _, file in leaderboard.linked(made)} >= {"peers"}
    assert "no records" in leaderboard.page({})
