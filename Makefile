# make demo    the main job on the embedded default
# make test    the tests that need neither a GPU nor a network
# make bench   what HACL costs a step, on this machine: benchmarks/step.py
# make venv    .venv with everything both need (the others call it)
# make test-4.37 | test-4.57    the same tests on older transformers; make test-all: every version, with the slow tests

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEEPSPEED = deepspeed==0.19.8
STACK = transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
STACK_4.57 = transformers==4.57.6 accelerate==1.15.0 peft==0.21.2
# What LLaVA itself was written for: accelerate 1.0 and peft 0.13 do not go with it.
STACK_4.37 = transformers==4.37.2 accelerate==0.34.2 peft==0.10.0
LLAVA = llava-torch==1.2.2.post1

.PHONY: demo test bench test-slow test-4.37 test-4.57 test-all venv lint clean

venv: .venv/.made

# torch first, so that nothing else picks one; llava without its pins, which nothing current satisfies. The constraints
# hold what these would bring along (docs/reliability.md).
define make_venv
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hacl_llava: make needs Python 3.11 or newer")'
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -q --upgrade pip
	$(1)/bin/python -m pip install -q -c $(3) $(TORCH)
	$(1)/bin/python -m pip install -q -c $(3) $(2) $(DEEPSPEED) -e '.[dev]'
	$(1)/bin/python -m pip install -q --no-deps $(LLAVA)
	touch $(1)/.made
endef

.venv/.made: setup.py Makefile .ci/constraints-5.txt
	$(call make_venv,.venv,$(STACK),.ci/constraints-5.txt)

.venv-4.57/.made: setup.py Makefile .ci/constraints-4.57.txt
	$(call make_venv,.venv-4.57,$(STACK_4.57),.ci/constraints-4.57.txt)

.venv-4.37/.made: setup.py Makefile .ci/constraints-4.37.txt
	$(call make_venv,.venv-4.37,$(STACK_4.37),.ci/constraints-4.37.txt)

demo: venv
	.venv/bin/hacl-llava demo --output runs/demo

test: venv
	.venv/bin/python -m pytest

bench: venv
	.venv/bin/python benchmarks/step.py

test-slow: venv
	.venv/bin/python -m pytest -m 'e2e or distributed or once'

# Older transformers: without what is marked `once`, and without files that need neither torch nor transformers; the middle
# of the range also without the slow tests of one process.
ANY_VERSION = scores report records security hallucinate_api hallucinate_rules hallucinate_run
NOT_AGAIN = $(ANY_VERSION:%=--ignore=tests/test_%.py)

test-4.57: .venv-4.57/.made
	.venv-4.57/bin/python -m pytest -m 'not gpu and not once and (distributed or not e2e)' $(NOT_AGAIN)

test-4.37: .venv-4.37/.made
	.venv-4.37/bin/python -m pytest -m 'not gpu and not once' $(NOT_AGAIN)

test-all: test test-slow test-4.57 test-4.37

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf .venv .venv-4.37 .venv-4.57 runs build dist *.egg-info
