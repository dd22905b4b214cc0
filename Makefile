# make demo: the whole of moeflow on a small model, from nothing. make test: ruff, the type checker and the tests.
.PHONY: setup demo test test-all pytest check bench

setup:
	@infra/setup.sh

demo: setup
	@infra/demo.sh

check: setup
	@infra/python.sh -m ruff check -q . && infra/python.sh -m ruff format --check -q . && infra/python.sh -m mypy

test: setup
	@$(MAKE) --no-print-directory -j 2 check pytest

pytest: setup
	@OMP_NUM_THREADS=1 infra/python.sh -m pytest -n 3 --dist loadgroup --no-loadscope-reorder

# Also what takes long: every family everywhere, every pair of methods on every family, clusters that lose nodes.
test-all: check
	@OMP_NUM_THREADS=1 infra/python.sh -m pytest --slow -n 3 --dist loadgroup --no-loadscope-reorder

bench: setup
	@infra/python.sh -m benchmarks
