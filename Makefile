PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
SOURCES = setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*.cu csrc/*.h)

# Bytecode is made where it is first used: making all of torch's at the install would take most of its time.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help demo test bench bench-baseline lab lab-quick real-data compat cluster kernels gpu-suite starter picture docs dist lint core-test \
	clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

demo: $(VENV)/installed  ## Install, then train the starter model on the built-in tasks
	$(BIN)/nrt-fast train

test: $(VENV)/installed-test  ## Install with what the tests need, then run them
	$(BIN)/python -m pytest -n auto --dist worksteal

bench: build/bench.json  ## Time our ops beside their peers; fails if one became slower
	$(BIN)/python bench/gate.py build/bench.json

bench-baseline: build/bench.json  ## The same, and commit to these ratios
	$(BIN)/python bench/gate.py build/bench.json --write

.PHONY: build/bench.json
build/bench.json: $(VENV)/installed-bench
	mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-disable-gc --benchmark-columns=median,iqr,rounds --benchmark-sort=name \
		--benchmark-json=$@

lab: $(VENV)/installed-test  ## Train every preset on three kinds of tasks (an hour; goes on if stopped), write docs/objectives.md
	$(BIN)/python bench/objectives.py

lab-quick: $(VENV)/installed-test  ## Three presets, fewer seeds and steps; fails if thinking does not pay where it is needed
	$(BIN)/python bench/objectives.py --quick

real-data: $(VENV)/installed-test  ## nrt-ws and sft from a base made of the rows in DATA (an hour; goes on if stopped), write docs/results.md
	$(BIN)/python bench/real_data.py $(DATA)

compat: $(VENV)/installed-test  ## Other trainers and readers, at versions of their own: installs each, then checks ours in it
	$(BIN)/python tests/compat/loads.py
	$(BIN)/python tests/compat/trl_versions.py
	$(BIN)/python tests/compat/peers.py

cluster: $(VENV)/installed-test  ## Ranks on two hosts (network namespaces; root), killed, cut off and started again
	$(BIN)/python tests/compat/cluster.py

kernels: $(VENV)/installed-test  ## Write the table of what the compiler makes of each kernel
	$(BIN)/python tests/compile_lane.py --write

gpu-suite:  ## On a GPU machine, not installed: check every op, then time it beside floor and peers
	$(PYTHON) bench/gpu_suite.py --build --out bench/results/gpu.json

starter: $(VENV)/installed  ## Make the starter model again from its recipe
	$(BIN)/python -m nrt_fast.starter.recipe --output_dir src/nrt_fast/starter/model

picture: $(VENV)/installed-test  ## Draw docs/demo.svg and, with Chromium, docs/report.png from the run in runs/demo
	$(BIN)/python docs/plot_run.py runs/demo docs/demo.svg
	$(BIN)/nrt-fast report runs/demo
	$(BIN)/python docs/picture_report.py runs/demo/report.html docs/report.png

docs: $(VENV)/installed-docs  ## Build the site into build/site; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/installed-dist  ## Build an sdist and, from it, a wheel with the C++ ops; install that without a compiler
	rm -rf dist
	NRT_FAST_EXT=$${NRT_FAST_EXT:-cpu} $(BIN)/python -m build --no-isolation
	$(BIN)/python tests/check_dist.py dist

lint: $(VENV)/installed-test  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

core-test:  ## Test the torch-free C++ core under AddressSanitizer and UBSan
	cmake -S . -B build/core
	cmake --build build/core --parallel
	ctest --test-dir build/core --output-on-failure

clean:  ## Remove the virtual environment and what was built
	rm -rf $(VENV) build dist src/*.egg-info src/nrt_fast/*.so

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	touch $@

# torch comes first, so that the isolated build of the C++ ops finds it.
$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(INSTALL) --editable .
	touch $@

$(VENV)/installed-%: $(VENV)/torch $(SOURCES)
	$(INSTALL) --editable ".[$*]"
	touch $@
