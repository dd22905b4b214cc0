# make demo: the whole of moeflow on a small model, from nothing. make test: ruff, the type checker and the tests.
.PHONY: setup demo test test-all test-serve test-gguf pytest check bench chaos docs

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

# Also what takes long: every family everywhere, every pair of methods on every family, the newest transformers, clusters that lose nodes.
test-all: check
	@OMP_NUM_THREADS=1 infra/python.sh -m pytest --slow -n 3 --dist loadgroup --no-loadscope-reorder

# What moeflow writes, in vLLM on a processor, in an environment of its own: .venv-serve, or $SERVE_VENV. ONLY="-k mixtral" and so on.
test-serve:
	@infra/serve.sh $(ONLY)

# What moeflow writes, as GGUF in llama.cpp, in an environment of its own: .venv-gguf, or $GGUF_VENV.
test-gguf:
	@infra/gguf.sh $(ONLY)

# Hurts runs on a folder, on moto and on SeaweedFS until MINUTES are over, and compares every byte; ONLY="--only faults" and so on.
MINUTES ?= 60
chaos: setup
	@infra/python.sh -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[chaos]' || true
	@infra/python.sh -m tests.chaos --minutes $(MINUTES) $(ONLY)

bench: setup
	@infra/python.sh -m benchmarks

# The pages of docs/ as a site in build/site, with the options made from the code; a link that leads nowhere ends it.
docs: setup
	@infra/python.sh -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 infra/python.sh -m mkdocs build -q && echo "the site is in build/site"
