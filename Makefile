# make demo         an environment, an install, a text crammed, decoded and certified
# make check        lint, types and the fast tests, in about a minute and a half: for every edit
# make test         lint, types and the whole suite
# make coverage     the same, with the lines that no test reaches
# make lock         write requirements.lock anew from the ranges in pyproject.toml
# make test-eval    the tests of evaluation, with lm-evaluation-harness, as in requirements-eval.lock
# make docs         the documentation as a site in site/, built strictly and without network
# make page         runs studies/pocket-full.toml (about an hour on two cores) into docs/pocket-full
# make engines      inference engines, each in its own environment, and docs/engines.md
# make test-newest  the whole suite with the newest release of every library
# make test-oldest  the whole suite with the lowest releases that pyproject.toml allows

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The release that the lock holds. Some registries keep the small CPU build under this version.
TORCH ?= torch==2.13.0
UV ?= uv==0.13.9
PIP = -m pip --quiet --quiet --disable-pip-version-check
# Each process takes half of the files and, when it is done, some of the other's tests: what the
# tests of a file share (a study, a model) is made once. What pytest makes of the tests' code is kept
# for the next run, in images whose Python keeps nothing too.
SUITE = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
# Every extra but 'eval', which has a lock of its own.
EXTRAS = $(foreach extra,study hub peft ray big benchmarks,--extra $(extra))
COMPILE = uv pip compile --quiet $(EXTRAS) --group test --group build --python-version 3.11

.PHONY: demo check lint style types fast test coverage lock test-newest test-oldest install clean

install: $(VENV)/.installed

# Everything that an install takes is in the lock, what builds the package too.
$(VENV)/.installed: pyproject.toml requirements.lock
	@echo "memvec: making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "memvec: installing $(TORCH) and what else the package needs, as in requirements.lock"
	@$(BIN)/python $(PIP) install --constraint requirements.lock "$(TORCH)" hatchling editables
	@$(BIN)/python $(PIP) install --constraint requirements.lock --no-build-isolation --editable .
	@$(BIN)/python -m pip check > /dev/null || $(BIN)/python -m pip check
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	@echo "memvec: installing the test tools, as in requirements.lock"
	@$(BIN)/python $(PIP) install --requirement requirements.lock
	@$(BIN)/python -m pip check > /dev/null || $(BIN)/python -m pip check
	@touch $@

demo: $(VENV)/.installed
	mkdir -p demo
	$(BIN)/memvec cram examples/bus.txt --tokens 48 --output demo/bus.mem --force
	$(BIN)/memvec cram examples/letter.txt --output demo/letter.mem --force
	$(BIN)/memvec verify demo/letter.mem
	$(BIN)/memvec decode demo/bus.mem > demo/bus.txt
	$(BIN)/memvec decode demo/letter.mem > demo/letter.txt
	cmp examples/bus.txt demo/bus.txt
	cmp examples/letter.txt demo/letter.txt
	@echo "demo/bus.txt (48 tokens from one vector) and demo/letter.txt are those of examples/: the same bytes."

style: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tested
	$(BIN)/mypy

fast: $(VENV)/.tested
	$(SUITE) -m "not slow"

lint: style types

# Side by side: the first mypy of a checkout has no cache, and takes a quarter of the time.
check: style
	@$(MAKE) --no-print-directory --jobs 2 types fast

test: lint
	$(SUITE)

coverage: lint
	$(SUITE) --cov --cov-report=term-missing:skip-covered

lock:
	@echo "memvec: resolving the ranges of pyproject.toml with $(TORCH)"
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python $(PIP) install "$(UV)"
	@echo "$(TORCH)" > .venv-lock/torch.txt
	@echo "# Written by 'make lock'. What 'make demo' and 'make test' install." > .venv-lock/lock
	@.venv-lock/bin/$(COMPILE) --universal --no-header --no-annotate --constraint .venv-lock/torch.txt \
		$(NOT_CUDA) pyproject.toml >> .venv-lock/lock
	@mv .venv-lock/lock requirements.lock
	@rm -r .venv-lock

# CUDA's libraries come with the build of torch that needs them, in the versions that it names.
NOT_CUDA = $(foreach part,$(CUDA),--no-emit-package $(part))
CUDA = cuda-bindings cuda-pathfinder cuda-toolkit triton nvidia-cublas nvidia-cuda-cupti \
	nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile \
	nvidia-curand nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 \
	nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx

test-newest:
	@echo "memvec: making .venv-newest with the newest release of every library"
	@$(PYTHON) -m venv .venv-newest
	@.venv-newest/bin/python $(PIP) install --upgrade $$($(PYTHON) .ci/newest.py)
	@.venv-newest/bin/python $(PIP) install --no-deps --no-build-isolation --editable .
	$(MAKE) --no-print-directory VENV=.venv-newest suite

test-oldest:
	@echo "memvec: making .venv-oldest with the lowest releases that pyproject.toml allows"
	@$(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python $(PIP) install "$(UV)"
	@.venv-oldest/bin/$(COMPILE) --resolution lowest-direct --no-header --no-annotate \
		--output-file .venv-oldest/requirements.txt pyproject.toml
	@.venv-oldest/bin/python $(PIP) install --requirement .venv-oldest/requirements.txt
	@.venv-oldest/bin/python $(PIP) install --no-deps --no-build-isolation --editable .
	$(MAKE) --no-print-directory VENV=.venv-oldest suite

.PHONY: docs lock-docs
docs: .venv-docs/.installed
	@echo "memvec: building the site in site/; a broken link or reference is an error"
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --clean --quiet
	@echo "memvec: open site/index.html"

.venv-docs/.installed: requirements-docs.lock
	@echo "memvec: making the environment .venv-docs"
	@$(PYTHON) -m venv .venv-docs
	@echo "memvec: installing the documentation tools, as in requirements-docs.lock"
	@.venv-docs/bin/python $(PIP) install --requirement requirements-docs.lock
	@touch $@

lock-docs:
	@echo "memvec: resolving the group 'docs' of pyproject.toml"
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python $(PIP) install "$(UV)"
	@echo "# Written by 'make lock-docs'. What 'make docs' installs." > .venv-lock/lock
	@.venv-lock/bin/uv pip compile --quiet --group docs --python-version 3.11 --universal \
		--no-header --no-annotate >> .venv-lock/lock
	@mv .venv-lock/lock requirements-docs.lock
	@rm -r .venv-lock

# The study, every column of a sample computed again, then its report and its rows.
STUDY = .runs/pocket-full.study
.PHONY: page
page: $(VENV)/.tested
	mkdir -p .runs
	$(BIN)/memvec study run studies/pocket-full.toml --workers 2 --out $(STUDY)
	$(BIN)/memvec study check $(STUDY) --sample 12
	rm -rf docs/pocket-full
	$(BIN)/memvec study report $(STUDY) --out docs/pocket-full
	rm docs/pocket-full/figures/*.pdf
	$(BIN)/memvec study export $(STUDY) --csv docs/pocket-full/rows.csv

.PHONY: test-eval lock-eval
test-eval: .venv-eval/.installed
	OMP_NUM_THREADS=1 .venv-eval/bin/python -m pytest tests/test_evaluate.py

.venv-eval/.installed: pyproject.toml requirements-eval.lock
	@echo "memvec: making the environment .venv-eval, as in requirements-eval.lock"
	@$(PYTHON) -m venv .venv-eval
	@.venv-eval/bin/python $(PIP) install --requirement requirements-eval.lock
	@.venv-eval/bin/python $(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# Without the extra 'study': its matplotlib and the harness ask for different releases of dateutil,
# and together they would get a pytablewriter that is years old.
lock-eval:
	@echo "memvec: resolving the extra 'eval' of pyproject.toml with $(TORCH)"
	@$(PYTHON) -m venv .venv-lock
	@.venv-lock/bin/python $(PIP) install "$(UV)"
	@echo "$(TORCH)" > .venv-lock/torch.txt
	@echo "# Written by 'make lock-eval'. What 'make test-eval' installs." > .venv-lock/lock
	@.venv-lock/bin/uv pip compile --quiet --extra eval --group test --group build --universal \
		--python-version 3.11 --no-header --no-annotate --constraint .venv-lock/torch.txt \
		$(NOT_CUDA) pyproject.toml >> .venv-lock/lock
	@mv .venv-lock/lock requirements-eval.lock
	@rm -r .venv-lock

# Engines run in environments of their own: .engines/NAME, or those of another folder. One that
# cannot be made here is said to be missing, and the page lists its engine as not run.
# ASKED=--resume keeps the answers of earlier starts, and ASKED='--engines vllm' asks one engine.
ENGINES ?= .engines
ENGINES_WORK ?= .runs/engines
ASKED ?=
.PHONY: engines
engines: $(VENV)/.tested
	@for name in vllm llama.cpp mlx; do \
		$(MAKE) --no-print-directory $(ENGINES)/$$name/bin/python || \
			echo "memvec: no environment for $$name" >&2; \
	done
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engines.py --work $(ENGINES_WORK) --environments $(ENGINES) $(ASKED)

# An install that fails leaves nothing, so that it is tried again. Where torchvision or its like was
# built for another torch than the one that is there, vLLM does not start; it starts without them.
$(ENGINES)/%/bin/python:
	@echo "memvec: making the environment $(ENGINES)/$*, as in benchmarks/engines-$*.txt"
	@rm -rf $(ENGINES)/$*
	@mkdir -p $(ENGINES)
	@$(PYTHON) -m venv $(ENGINES)/$*
	@$(ENGINES)/$*/bin/python $(PIP) install --requirement benchmarks/engines-$*.txt || \
		{ rm -rf $(ENGINES)/$*; exit 1; }
	@for part in torchvision torchaudio torchcodec; do \
		$(ENGINES)/$*/bin/python -c "import $$part" 2> /dev/null || \
			$(ENGINES)/$*/bin/python $(PIP) uninstall --yes $$part 2> /dev/null; \
	done

.PHONY: suite
suite:
	$(BIN)/python -c "import torch, transformers as t; print('torch', torch.__version__, 'transformers', t.__version__)"
	$(SUITE)

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-lock .venv-docs .venv-eval .venv-mlx .engines site demo .pytest_cache .mypy_cache .ruff_cache .coverage
