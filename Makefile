# make demo: the whole of moeflow on a small model, from nothing. make test: ruff, the type checker and the tests.
.PHONY: setup demo test check bench

setup:
	@infra/setup.sh

demo: setup
	@infra/demo.sh

check: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check -q . && .venv/bin/mypy

test: check
	@.venv/bin/python -m pytest

bench: setup
	@.venv/bin/python -m benchmarks
