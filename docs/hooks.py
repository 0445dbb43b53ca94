"""What the site makes of records when it is built: the leaderboard, and the records that it links to."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from dhbe.bench import leaderboard

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the leaderboard and its records to the pages."""
    board = leaderboard.board(ROOT / "results")
    files.append(File.generated(config, "leaderboard.md", content=leaderboard.page(board)))
    for address, record in leaderboard.linked(board):
        files.append(File.generated(config, address, content=record.read_text()))
    return files
