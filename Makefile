# Every target makes the venv that it needs and installs into it; a second call finds it done.
#
#   make quickstart        fine-tune SmolLM2-135M-Instruct and show whether it got better
#   make test              the tests of every commit
#   make parity aot next   the tiers with venvs of their own: see below
#   make lint types        ruff; pyright on core and ops
#
# Arguments for pytest: make test ARGS="-k lora".

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

ARGS ?=
comma := ,
MAIN := .venv/.installed
PARITY := .venv-parity/.installed
AOT := .venv-aot/.installed
NEXT := .venv-next/.installed
PYTEST := -m pytest -rs
QUICK := not parity and not aot and not slow and not cluster

# Nothing that a test does may depend on the network.
test parity aot next: export HF_HUB_OFFLINE := 1
test parity aot next: export JAX_PLATFORMS := cpu

# $(call venv,versions of Python to look for,arguments of pip install; of the next one; ...)
# What pip says goes to a file in the venv; its end is shown when an install fails.
define venv
@folder=$(@D); log=$$folder/install.log; \
if ! $$folder/bin/python -m pip --version >/dev/null 2>&1; then \
  python=$$(.ci/python $(1)); \
  echo "$$folder: making it with $$python"; \
  "$$python" -m venv $$folder; \
fi; \
: >$$log; start=$$SECONDS; \
IFS=';' read -ra calls <<<"$(2)"; \
for call in "$${calls[@]}"; do \
  echo "$$folder: pip install$$call"; \
  xargs $$folder/bin/python -m pip install --quiet <<<"$$call" >>$$log 2>&1 || { \
    grep -v '^WARNING' $$log | tail -n 30 >&2 || true; \
    echo "$$folder: the install failed; all that pip said: $$log" >&2; exit 1; }; \
done; \
echo "$$folder: installed in $$((SECONDS - start)) s"; touch $@
endef

.PHONY: help quickstart quickstart-seeds test parity aot next test-all lint format types clean venvs

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

quickstart: $(MAIN)
	.venv/bin/python -m experiments.quickstart --workdir=runs/quickstart --rows=64 $(ARGS)

quickstart-seeds: $(MAIN)
	.venv/bin/python -m experiments.quickstart --workdir=runs/quickstart-seeds --seeds=0,1,2 $(ARGS)

# Two workers: JAX compiles on one core. A file stays with one worker, which so keeps its programs.
test: $(MAIN)
	.venv/bin/python $(PYTEST) -n 2 --dist loadfile -m "$(QUICK)" $(ARGS)

# Against torch, transformers and Hugging Face PEFT.
parity: $(PARITY)
	OMP_NUM_THREADS=1 .venv-parity/bin/python $(PYTEST) -n 2 --dist loadfile -m "parity and not slow and not cluster" $(ARGS)

# Compiles for TPUs and GPUs that are not here.
aot: $(AOT)
	.venv-aot/bin/python -c "import libtpu, jax_plugins.xla_cuda12"
	.venv-aot/bin/python $(PYTEST) -n 2 --dist loadfile -m "aot and not slow and not cluster" tests/aot $(ARGS)

# The newest JAX and Flax, a newer Python.
next: $(NEXT)
	.venv-next/bin/python -c "import jax, flax, sys; \
	print('Python', sys.version.split()[0], 'jax', jax.__version__, 'flax', flax.__version__)"
	.venv-next/bin/python $(PYTEST) -n 2 --dist loadfile -m "$(QUICK)" \
	  tests/next/smoke_test.py $(wildcard tests/core tests/ops) $(ARGS)

test-all: test parity aot next

lint: $(MAIN)
	.venv/bin/ruff check --output-format=concise .
	.venv/bin/ruff format --check .

format: $(MAIN)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

types: $(MAIN)
	.venv/bin/pyright

# One after another: two pips at once would write the same peftax.egg-info.
venvs: $(MAIN) $(PARITY) $(AOT) $(NEXT)

$(MAIN): pyproject.toml
	$(call venv,3 3.11 3.12 3.13, -e .[dev$(comma)quickstart])

# torch has wheels for this Python in a CPU build only where the machine keeps one; asked for first,
# so that no other requirement pulls a newer one with gigabytes of CUDA behind it.
$(PARITY): pyproject.toml
	$(call venv,3.11, torch==2.13.0; -e .[parity])

# Three heavy wheels: libtpu 213 MB, jax-cuda12-pjrt 174 MB, jax-cuda12-plugin 8 MB; no CUDA library.
$(AOT): pyproject.toml
	$(call venv,3.11, -e .[aot])

$(NEXT): pyproject.toml
	$(call venv,3.12 3.13 3.14 3.15, --upgrade --upgrade-strategy=eager -e .[dev])

clean:
	rm -rf .venv .venv-parity .venv-aot .venv-next build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
