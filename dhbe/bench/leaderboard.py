"""The leaderboard of defences against attacks, over all records; each cell links to its records and their command."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dhbe import records
from dhbe.bench.cases import with_needs
from dhbe.bench.catalogue import find
from dhbe.bench.scales import SCALES
from dhbe.bench.store import read
from dhbe.records import Record


@dataclass(frozen=True)
class Entry:
    """One run of a defence on a victim."""

    attack: str
    defense: str
    where: str
    """The network and the data."""
    lost: float
    """Loss of ACC in percentage points."""
    asr: float
    file: Path
    command: str


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seeds only."""

    entries: Sequence[Entry]

    @property
    def lost(self) -> float:
        """Mean over seeds."""
        return statistics.mean(each.lost for each in self.entries)

    @property
    def asr(self) -> float:
        """Mean over seeds."""
        return statistics.mean(each.asr for each in self.entries)


Board = Mapping[str, Mapping[tuple[str, str], Cell]]
"""Cells by network and data, then by defence and attack."""


def board(folder: Path) -> Board:
    """Reads all records below `results/`: those of `dhbe bench`, and the older ones of the peers."""
    cells: dict[str, dict[tuple[str, str], list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for each in (*_of_cases(folder / "bench"), *_of_peers(folder / "peers")):
        cells[each.where][each.defense, each.attack].append(each)
    return {where: {key: Cell(entries) for key, entries in found.items()} for where, found in cells.items()}


def page(made: Board) -> str:
    """The board as Markdown; records are linked as `records/PATH`, relative to `results/`."""
    parts = [
        "# Leaderboard\n",
        "Points of accuracy lost / attack success rate in %, means over seeds, with the number of seeds in brackets. A cell links "
        "to its first record; all records and commands are listed below. Rows are sorted by the worse of the two, over all attacks.\n",
    ]
    for where, cells in sorted(made.items()):
        attacks = sorted({attack for _, attack in cells})
        defenses = sorted({defense for defense, _ in cells}, key=lambda name: _worst(cells, name))
        parts.append(f"## {where}\n")
        parts.append("| defence | " + " | ".join(attacks) + " |\n" + "| --- " * (len(attacks) + 1) + "|")
        for defense in defenses:
            found = [cells.get((defense, attack)) for attack in attacks]
            parts.append(f"| {defense} | " + " | ".join(map(_cell, found)) + " |")
        parts.append("\n### Records and commands\n")
        parts.append("| defence | attack | records | command |\n| --- | --- | --- | --- |")
        for (defense, attack), cell in sorted(cells.items()):
            links = ", ".join(f"[{number}]({_link(each)})" for number, each in enumerate(cell.entries, 1))
            commands = "<br>".join(dict.fromkeys(f"`{each.command}`" for each in cell.entries))
            parts.append(f"| {defense} | {attack} | {links} | {commands} |")
        parts.append("")
    if not made:
        parts.append("There are no records yet.")
    return "\n".join(parts) + "\n"


def linked(made: Board) -> Iterator[tuple[str, Path]]:
    """The records that the page links to: their URLs and files."""
    for cells in made.values():
        for cell in cells.values():
            yield from ((_link(each), each.file) for each in cell.entries)


def _worst(cells: Mapping[tuple[str, str], Cell], defense: str) -> tuple[int, float]:
    mine = [cell for (name, _), cell in cells.items() if name == defense]
    return -len(mine), statistics.mean(max(cell.lost, cell.asr) for cell in mine)


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "—"
    return f"[{cell.lost:.1f} / {cell.asr:.1f}]({_link(cell.entries[0])}) ({len(cell.entries)})"


def _link(entry: Entry) -> str:
    return f"records/{entry.file.parent.name}/{entry.file.name}"


def _of_cases(folder: Path) -> Iterator[Entry]:
    for scale in SCALES.values():
        if scale.name == "smoke" or not (folder / scale.name).is_dir():
            continue  # its numbers are meaningless
        usual = _commands(scale.name)
        victims = {
            each.id: each for path in (folder / scale.name).glob("*.json") if (each := read(path)).work == "plant"
        }
        for path in sorted((folder / scale.name).glob("*.json")):
            case = read(path)
            planted = victims.get(case.needs[0]) if case.needs else None
            if case.work != "erase" or not case.record or not planted or case.id not in usual:
                continue
            side = planted.settings["settings"].get("side")
            attack = planted.settings["attack"] + (f"-{side}" if side else "")
            where = f"{planted.settings['arch']} on {planted.settings['data']}, scale {scale.name}"
            yield from _entry(attack, usual[case.id][0], where, case.record, path, usual[case.id][1])


def _of_peers(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.glob("*.json")):
        victim, defense, _ = path.stem.split("_")
        run, kind = records.read(path), victim.partition("-")[0]
        only = f"--only victim={kind} defense={defense}"
        where = "resnet8 on cifar10, victims of the zoo"
        yield from _entry(victim, defense, where, run, path, f"dhbe bench run peers --scale small {only}")


def _entry(attack: str, defense: str, where: str, run: Record, path: Path, command: str) -> Iterable[Entry]:
    before, after = run.before, run.after
    if before and after and before.acc is not None and after.acc is not None and after.asr is not None:
        yield Entry(attack, defense, where, 100 * (before.acc - after.acc), 100 * after.asr, path, command)


def _commands(scale: str) -> dict[str, tuple[str, str]]:
    """Each case's defence and command by id, for tables in which defences have their usual settings."""
    found: dict[str, tuple[str, str]] = {}
    for each in find(["table-3", "table-5", "peers"]):
        for case in with_needs(each.cases(SCALES[scale])).values():
            only = " ".join(f"{name}={value}" for name, value in case.labels.items())
            if case.work == "erase":
                command = f"dhbe bench run {each.name} --scale {scale} --only {only}"
                found.setdefault(case.id, (case.labels["defense"], command))
    return found
