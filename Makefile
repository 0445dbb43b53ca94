# uv looks where pip looks; nothing changes where PIP_FIND_LINKS is not set.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

demo: .venv/.ok
	.venv/bin/dhbe demo --out runs/demo

test: .venv/.ok
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow" -n auto --dist worksteal

# 20,000 mutated inputs of a fresh seed; those that did harm are kept.
fuzz: .venv/.ok
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.fuzz --cases 20000 --seed $$(date +%s) --keep runs/fuzz

check: .venv/.ok
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	.venv/bin/lint-imports
	.ci/audit

# The pages of docs/ as a site in build/site; no page and no build asks another host for anything.
site: .venv/.ok
	.venv/bin/mkdocs build --strict --quiet

# Every experiment at the scale smoke, to its table or figure.
bench: .venv/.ok
	OMP_NUM_THREADS=1 .venv/bin/dhbe bench run all --scale smoke --jobs 2 --out build/bench --work build/victims
	.venv/bin/dhbe bench show all --scale smoke --out build/bench --work build/victims --to build/drawn
	.venv/bin/dhbe bench show --check

.venv/.ok: pyproject.toml constraints.txt
	python3 -m venv .venv && .venv/bin/python -m pip install -q uv
	.venv/bin/uv pip install -q --python .venv/bin/python -c constraints.txt -e ".[dev]"
	touch $@

.PHONY: demo test fuzz check site bench
