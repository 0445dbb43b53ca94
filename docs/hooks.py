"""What the site makes when it is built: the leaderboard, the records that it links to, and a page of the notebook."""

import runpy
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from dhbe.bench import leaderboard

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the leaderboard with its records, and the notebook, to the pages."""
    board = leaderboard.board(ROOT / "results")
    files.append(File.generated(config, "leaderboard.md", content=leaderboard.page(board)))
    for address, record in leaderboard.linked(board):
        files.append(File.generated(config, address, content=record.read_text()))
    notebook = runpy.run_path(str(ROOT / "docs" / "notebook.py"))
    files.append(File.generated(config, "notebook.md", content=notebook["page"]()))
    return files
