# make run · make test [K=expression] · make quick · make check · make coverage · make bench · make gpu · make soak
PYTHON ?= python3
BIN := .venv/bin
# One thread per rank: what torchrun would set, without its warning.
export OMP_NUM_THREADS ?= 1
# uv reads its own variable for a package mirror, not pip's.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

# Commands run here, whatever slurm/site.toml says.
export FNET_LOGIN :=

.PHONY: run test pytest coverage quick check bench gpu soak clean

run: .venv/installed
	$(BIN)/python -m jobs run jobs/quickstart.toml --nproc-per-node 2

# The types are checked beside the first tests: each takes one core for a minute.
test: .venv/installed-dev
	.ci/slurm
	$(MAKE) --jobs=2 check pytest

# Three workers on two cores: a third of the tests wait for Slurm or for a time limit.
pytest: .venv/installed-dev
	$(BIN)/python -m pytest --numprocesses=3 $(if $(K),-k "$(K)")

# Apart from `test`, as it takes a minute more.
coverage: .venv/installed-dev
	rm -rf .coverage
	$(BIN)/coverage run -m pytest --numprocesses=3
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

quick: .venv/installed-dev
	$(BIN)/ruff check . && $(BIN)/python -m pytest -q --numprocesses=2 -m "not processes and not soak"

check: .venv/installed-dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/ruff check --preview --select PLW1514 fnet_dist jobs slurm  # every file is UTF-8, whatever the locale
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/installed-bench
	$(BIN)/python -m tests.benchmarks
	$(BIN)/python -m tests.benchmarks.loop
	$(BIN)/python -m tests.benchmarks.exchange
	$(BIN)/python -m tests.benchmarks.invariant
	$(BIN)/python -m tests.benchmarks.speedrun
	$(BIN)/python -m tests.benchmarks.startup
	$(BIN)/python -m tests.benchmarks.recovery
	$(BIN)/python -m tests.benchmarks.data
	$(BIN)/python -m tests.benchmarks.stall 60
	$(BIN)/python -m tests.benchmarks.tracking 200
	$(BIN)/python -m tests.benchmarks.blame 60

# On a machine with a GPU: correctness and speed there.
gpu: .venv/installed
	$(BIN)/python -m tests.benchmarks.gpu

# SEED=... repeats one; under 80 minutes, half of them for the part on a real Slurm: python -m tests.soak.on_slurm
soak: .venv/installed-dev
	$(BIN)/python -m tests.soak $(SEED)

clean:
	rm -rf .venv .coverage .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# torch and torchvision come together from the registry; uv takes seconds where pip takes minutes. Bytecode is compiled
# once, here: where PYTHONDONTWRITEBYTECODE is set, every process would spend seconds on compiling torch again.
.venv/uv: constraints.txt
	$(PYTHON) -m venv .venv || { echo "python3 -m venv failed; on Debian: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	touch $@

.venv/installed: .venv/uv pyproject.toml
	@echo "installing torch with its CUDA libraries: 5.7 GB in .venv, once"
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable .
	touch $@

.venv/installed-bench: .venv/installed
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[bench]'
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@
