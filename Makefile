# `make` lists what there is to make. Everything lands in .venv/ and build/, the whole of MNIST in data/MNIST/.

PYTHON ?= python3
LOCKED ?=
EXECUTED ?=
PYTEST_ARGS ?=

ifeq ($(strip $(PYTHON)),)
$(error PYTHON is empty: name an interpreter, Python 3.10 or later)
endif

# What else is on the command line is a parameter: make run EPOCHS=3 DEVICE=cpu
OWN := PYTHON LOCKED EXECUTED PYTEST_ARGS MAKEFLAGS MAKEOVERRIDES SHELL
NAMES := $(filter-out $(OWN),$(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v)))
quote = '$(subst ','\'',$1)'
PARAMETERS = $(foreach v,$(sort $(NAMES)),$(call quote,$v=$(value $v)))

TARGETS := help run test data notebooks html lab bench clean check python
UNKNOWN := $(filter-out $(TARGETS) .venv/.installed .venv/.installed-locked,$(MAKECMDGOALS))
ifneq ($(UNKNOWN),)
$(error $(UNKNOWN): there is no such target; a parameter is NAME=VALUE)
endif
ifneq ($(NAMES),)
ifeq ($(filter run bench,$(MAKECMDGOALS)),)
$(error $(sort $(NAMES)): only make run and make bench take parameters)
endif
endif
ifneq ($(filter-out 0 1,$(LOCKED) $(EXECUTED)),)
$(error LOCKED and EXECUTED must be 0 or 1, got $(filter-out 0 1,$(LOCKED) $(EXECUTED)))
endif

BUILD := $(CURDIR)/build
PY := .venv/bin/python
LOCK := $(filter-out 0,$(LOCKED))
REQUIREMENTS := $(if $(LOCK),.requirements.lock,requirements.txt)
INSTALLED := .venv/.installed$(if $(LOCK),-locked)

# Caches, settings and temporary files stay in the clone.
export HYPOTHESIS_STORAGE_DIRECTORY := $(BUILD)/hypothesis
export IPYTHONDIR := $(BUILD)/ipython
export JUPYTER_CONFIG_DIR := $(BUILD)/jupyter/config
export JUPYTER_DATA_DIR := $(BUILD)/jupyter/data
export JUPYTER_RUNTIME_DIR := $(BUILD)/jupyter/runtime
export MPLCONFIGDIR := $(BUILD)/matplotlib
export PIP_CACHE_DIR := $(BUILD)/pip
export RUFF_CACHE_DIR := $(BUILD)/ruff
export TORCHINDUCTOR_CACHE_DIR := $(BUILD)/inductor
export npm_config_cache := $(BUILD)/npm
export TORCH_EXTENSIONS_DIR := $(BUILD)/extensions
export TORCH_HOME := $(BUILD)/torch
export TRITON_CACHE_DIR := $(BUILD)/triton
export TRITON_HOME := $(BUILD)
export CUDA_CACHE_PATH := $(BUILD)/cuda
export XDG_CACHE_HOME := $(BUILD)/cache
export XDG_CONFIG_HOME := $(BUILD)/config
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A Unix socket's path holds about 100 characters: below a deep clone, sockets in TMPDIR would not open.
TMP := $(shell test $$(printf %s '$(subst ','\'',$(BUILD))/tmp' | wc -c) -le 60 && echo short)
ifeq ($(TMP),short)
export TMPDIR := $(BUILD)/tmp
endif

.PHONY: $(TARGETS)
.NOTPARALLEL:

help:
	@echo 'make run        run every notebook into build/notebooks/; QUICK=1 for small sizes,'
	@echo '                ONLY="05 07" for some chapters; their parameters, such as EPOCHS=3'
	@echo '                DEVICE=cpu, go on the same line (a wrong one lists them all)'
	@echo 'make test       lint, and test everything'
	@echo 'make data       download the whole of MNIST into data/MNIST/'
	@echo 'make notebooks  run the notebooks with their defaults and keep the outputs in notebooks/'
	@echo 'make html       export the notebooks as pages, to read offline: build/html/index.html;'
	@echo '                EXECUTED=1 for those of the last make run'
	@echo 'make lab        open JupyterLab'
	@echo 'make bench      time and measure the layers; takes parameters as make run does'
	@echo 'make clean      remove build/ and .venv/'
	@echo 'PYTHON=...      the interpreter for .venv/, 3.10 or later; python3 by default'
	@echo 'LOCKED=1        install the versions that made the committed outputs'

# glibc maps each large tensor afresh; in large pages this takes half of the system's time.
run notebooks: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
run: check $(INSTALLED)
	@$(PY) -m helpers.book.run run $(PARAMETERS)

# Two processes and no more, as each may run a page; by file, as tests of a file share what was made for them;
# in order, which is book/ first: few tests, but the longest.
test: $(INSTALLED)
	@$(PY) -m ruff check .
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -o cache_dir=build/pytest helpers/tests $(PYTEST_ARGS)

data: $(INSTALLED)
	@$(PY) -c 'from torchvision.datasets import MNIST; print(MNIST("data", download=True))'

notebooks: $(INSTALLED)
	@$(PY) -m helpers.book.run refresh

html: $(INSTALLED)
	@$(PY) -m helpers.book.run html $(if $(filter-out 0,$(EXECUTED)),--executed)

lab: $(INSTALLED)
	@$(PY) -m jupyterlab

bench: $(INSTALLED)
	@$(PY) -m helpers.book.bench $(PARAMETERS)

clean:
	rm -rf build .venv
	find helpers data -name __pycache__ -type d -prune -exec rm -rf {} +

python:
	@$(PYTHON) -c '' 2>/dev/null || \
		{ echo 'There is no Python at $(PYTHON): install Python 3.10 or later, or name one: make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=..." >&2; exit 1; }
	@mkdir -p build/tmp

# Before anything is installed: a wrong parameter must not cost an installation.
check: python
	@$(PYTHON) helpers/book/parameters.py $(PARAMETERS)

# The stamp is made last, so that an installation that broke off is taken up again.
$(INSTALLED): $(REQUIREMENTS) | python
	@$(PYTHON) -m venv .venv
	@rm -f .venv/.installed*
	@$(PYTHON) helpers/book/install.py $<
	@rm -rf build/pip
	@touch $@
