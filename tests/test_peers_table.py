from pathlib import Path

import pytest

from dhbe import records
from dhbe.defenses import PEERS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results" / "peers"
PAGE = (ROOT / "docs" / "defenses.md").read_text()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_record_tells_what_was_lent_and_its_name_says_what_it_is(path):
    record = records.read(path)
    _, name, seed = path.stem.split("_")
    settings = record.defense
    assert (settings["name"], record.seed) == (name, int(seed))
    needs = PEERS[name].needs if name in PEERS else ()  # DHBE stands beside them
    assert ("images_sha256" in settings) == ("clean images" in needs)
    assert record.after.asr is not None


@pytest.mark.parametrize("name", PEERS)
def test_the_page_tells_of_every_defence_what_it_needs(name):
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
    needs = row.split("|")[3].strip()
    assert needs == (", ".join(sorted(PEERS[name].needs)) or "nothing")
