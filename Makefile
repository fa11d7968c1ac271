# Each target sets up what it needs, from nothing but python3 (>= 3.11) and make.
PYTHON ?= python3
VENV ?= .venv
LOCK = requirements.txt
WORKERS ?= auto
# Tests wait for servers and processes: `auto` is three workers more than there are cores.
export PYTEST_XDIST_AUTO_NUM_WORKERS ?= $(shell $(PYTHON) -c 'import os; print(len(os.sched_getaffinity(0)) + 3)')
# The suite starts hundreds of processes: each would compile the packages again.
unexport PYTHONDONTWRITEBYTECODE
# By stealing: chunks of even size are not of even length, and two thirds of a minute were lost.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(IN_MEMORY)
# Each test empties its tables, which makes dozens of files anew (ADR 0090).
MEMORY = /dev/shm/beatless-$(shell pwd | cksum | cut -d' ' -f1)
IN_MEMORY = $(shell awk '/^MemAvailable/ {exit $$2 < 6291456}' /proc/meminfo && mkdir -p $(MEMORY) 2>/dev/null && \
  [ "$$(df -Pk $(MEMORY) | awk 'END {print $$4}')" -gt 4194304 ] && [ -w $(MEMORY) ] && echo --beatless-directory=$(MEMORY))
BIN = $(VENV)/bin
STAMP = $(VENV)/installed
DOCS_STAMP = $(VENV)/installed-docs
EXTRAS = --extra dev --extra test --extra suite --extra browser --extra docker --extra otel --extra check
EXTRAS_OLDEST = --extra dev --extra test --extra suite --extra otel

.PHONY: help install build demo test test-oldest test-django6 test-wheel test-random test-long coverage test-browser install-readers test-readers screenshots test-netns chaos chaos-scenarios soak reliability planted check-deploy test-docker test-rabbitmq test-pgbouncer bench bench-table check lock clean format architecture test-one dev docs bench-retention bench-fanout bench-capacity bench-takeover bench-waits bench-limits bench-peers lock-peers performance
.DEFAULT_GOAL := help

help: ## Show what there is to make
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## Create the virtual environment with everything the other targets need

$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "beatless needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

dev: $(STAMP) ## The whole stack in the foreground, until Ctrl-C; ARGS="--port 8400"
	$(BIN)/beatless dev --ephemeral $(ARGS)

build: $(STAMP) ## The source distribution and the wheel that is made of it, in dist/
	@rm -rf build dist
	$(BIN)/python -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >/dev/null
	$(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist dist/*.tar.gz

demo: $(STAMP) ## Run the main job on throw-away services and check it
	$(BIN)/beatless demo

test: $(STAMP) ## The suite, in parallel, on embedded Postgres and Valkey
	@mkdir -p .tmp
	TMPDIR="$(CURDIR)/.tmp" $(PYTEST) $(ARGS)

test-one: $(STAMP) ## One file or test: make test-one T=tests/unit/test_plan.py
	@[ -n "$(T)" ] || { echo "say which: make test-one T=tests/unit/test_plan.py" >&2; exit 2; }
	@mkdir -p .tmp
	TMPDIR="$(CURDIR)/.tmp" $(BIN)/python -m pytest -m "long or not long" $(T) $(ARGS)

test-random: $(STAMP) ## The suite in random order; SEED=n repeats an order, which pytest prints
	@$(MAKE) test ARGS="-p randomly $(if $(SEED),--randomly-seed=$(SEED)) $(ARGS)"

test-wheel: build ## What `make build` makes, in an empty environment with the newest of everything
	$(BIN)/python -m pytest deploy/wheel -n 0 $(ARGS)

# On the oldest Postgres as well where Debian has installed it.
OLDEST_POSTGRES = $(wildcard /usr/lib/postgresql/15/bin)
IN_OLDEST = unit $(addprefix integration/test_,$(addsuffix .py,runs queues races workers kills cancel retry_run limits \
  processes environment stream tail api relay publishers kit kit_calls migrations doctor context sessions changed_plans))

test-oldest: ## The heart of the suite with the oldest of everything that pyproject.toml allows (Python 3.11)
	@$(MAKE) install VENV=$(VENV)-oldest LOCK=requirements-oldest.txt
	@mkdir -p .tmp
	TMPDIR="$(CURDIR)/.tmp" $(VENV)-oldest/bin/python -m pytest -n $(WORKERS) --dist worksteal $(IN_MEMORY) $(IN_OLDEST:%=tests/%) \
	  --ignore tests/unit/test_lint_rules.py -m "not long" $(OLDEST_POSTGRES:%=--beatless-postgres-bin=%) $(ARGS)

test-django6: ## django.tasks on Django 6, with Django's own tests of it; exit 3 unless PYTHON is 3.12 or newer
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "Django 6 needs Python 3.12 or newer; try: make PYTHON=python3.12 test-django6" >&2; exit 3; }
	@$(MAKE) install VENV=$(VENV)-django6 LOCK=requirements-django6.txt
	@mkdir -p .tmp
	TMPDIR="$(CURDIR)/.tmp" $(VENV)-django6/bin/python -m pytest deploy/django6 -n 0 $(ARGS)

# Nothing downloads a browser: the distribution's is driven.
BROWSER = $(BIN)/python -c 'from tests.browser.chromium import find; import sys; sys.exit(not find())' || \
	  { echo "there is no Chromium on the PATH: apt-get install chromium, or run make test" >&2; exit 3; }

test-browser: $(STAMP) ## The run page and Flower in a real Chromium; exit 3 without one
	@$(BROWSER)
	$(PYTEST) tests/browser $(ARGS)

READERS = tests/readers/node_modules/.package-lock.json
NODE = node -e 'process.exit(Number(parseInt(process.versions.node) < 20))' 2>/dev/null && command -v npm >/dev/null || \
	  { echo "node 20 or newer and npm are not there: install them, or run make test" >&2; exit 3; }

install-readers: ## What test-readers needs, from the registry that npm is set up for; exit 3 without node, npm or that registry
	@$(NODE)
	@$(MAKE) --no-print-directory $(READERS) || { echo "npm cannot install what tests/readers/package-lock.json names" >&2; exit 3; }

$(READERS): tests/readers/package-lock.json
	npm ci --prefix tests/readers --no-audit --no-fund --no-update-notifier

test-readers: $(STAMP) install-readers ## Readers of npm find in our streams, cut anywhere, what the journal has
	$(PYTEST) tests/readers -n 0 $(ARGS)

screenshots: $(STAMP) ## Make the pictures of docs/images anew; exit 3 without a Chromium
	@$(BROWSER)
	$(BIN)/python -m tests.browser.screenshots docs/images

# What Postgres and Redis decide: locks, transactions, NOTIFY, plans of statements, pub/sub, the broker.
IN_CONTAINERS = append arrays cancel credentials dead_letters doctor doorbell drain_plan duplicates durability failover \
  fair_turns groups history kept_slots kills kit_calls limits limits_of_steps lists lost_transactions metrics migrations \
  next_runs online_migrations postgres_faults processes publishers queues races rates redis_servers relay relay_faults \
  relay_locks retention round_trips run_limits runs schedules sessions signals start_from_sql statement_plans stream tail \
  takeover two_phase wait_races wakeup_promises workers

# Ryuk, which removes what a killed session has left, is one more image that an engine must have.
test-docker: export TESTCONTAINERS_RYUK_DISABLED = true
test-docker: $(STAMP) ## What the servers decide on containers, a worker in one, the compose deployment; exit 3 without an engine
	@docker info >/dev/null 2>&1 || { echo "there is no Docker engine: start one, or run make test" >&2; exit 3; }
	docker build -q --network host $(foreach name,PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_CERT,$(if $($(name)),--build-arg $(name))) \
	  -t beatless:local -f deploy/Dockerfile .
	$(BIN)/python -m pytest deploy/tests -n 0 -p docker_tools -p celery
	$(PYTEST) $(IN_CONTAINERS:%=tests/integration/test_%.py) --beatless-services=testcontainers

ON_RABBITMQ = runs durability queues cancel races retry_run compensation limits processes kills agent_loop kit_calls

test-rabbitmq: $(STAMP) ## What touches the broker, on RabbitMQ; exit 3 if it is not installed
	@mkdir -p .tmp
	TMPDIR="$(CURDIR)/.tmp" $(BIN)/python -m tests.rabbitmq \
	  $(PYTEST) $(ON_RABBITMQ:%=tests/integration/test_%.py) -m "long or not long" $(ARGS)

test-pgbouncer: $(STAMP) ## Behind a PgBouncer in transaction mode; exit 3 if it is not installed
	@PATH="$$PATH:/usr/sbin" command -v pgbouncer >/dev/null || { echo "there is no pgbouncer: apt-get install pgbouncer" >&2; exit 3; }
	PATH="$$PATH:/usr/sbin" $(PYTEST) tests/pgbouncer $(ARGS)

chaos: $(STAMP) ## Random faults under load on a fleet of processes, checked; SEED=n SECONDS=60
	$(BIN)/python -m tests.faults $(if $(SEED),--seed $(SEED)) $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

chaos-scenarios: $(STAMP) ## The five chaos scenarios of a public harness (6 minutes); ARGS="--only pool_exhaustion"
	$(BIN)/python -m tests.faults.scenarios $(ARGS)

soak: $(STAMP) ## A steady load, and whether memory, connections or tables grow; SECONDS=600
	$(BIN)/python -m tests.faults.soak $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

reliability: $(STAMP) ## Write docs/reliability.md from the stored results of these
	$(BIN)/python -m tests.faults.reliability

planted: $(STAMP) ## Plant known bugs in copies of the tree, and let the load of make chaos find each
	$(BIN)/python -m tests.faults.planted $(ARGS)

test-netns: $(STAMP) ## Two hosts whose link is cut, as network namespaces; exit 3 unless root may make them
	@unshare --net true 2>/dev/null && command -v ip >/dev/null && command -v nsenter >/dev/null || \
	  { echo "network namespaces need root and iproute2: run it as root, in a container with CAP_SYS_ADMIN and CAP_NET_ADMIN" >&2; exit 3; }
	unshare --net $(BIN)/python -m pytest deploy/netns -n 0 -s $(ARGS)

check-deploy: $(STAMP) ## What promtool, kubectl, systemd, nginx, Caddy and Compose say of deploy/; exit 3 without all of them
	@PATH="$$PATH:/usr/sbin"; there=""; \
	for tool in promtool kubectl systemd-analyze nginx caddy docker-compose; do \
	  name=$${tool#docker-}; name=$${name%-analyze}; \
	  if command -v $$tool >/dev/null; then there="$$there$${there:+ or }$$name"; else echo "not checked, there is no $$tool"; fi; \
	done; \
	[ -n "$$there" ] || { echo "none of the tools is there" >&2; exit 3; }; \
	$(BIN)/python -m pytest deploy/checks -n 0 -k "$$there" $(ARGS)

bench: $(STAMP) ## Measure the journal and the relay against what they could be (8 minutes)
	$(BIN)/python -m benchmarks.relay
	$(BIN)/python -m benchmarks.table

bench-table: $(STAMP) ## Write benchmarks/README.md from the last results
	$(BIN)/python -m benchmarks.table

bench-retention: $(STAMP) ## Measure retention in batches beside partitions (3 minutes)
	$(BIN)/python -m benchmarks.retention

bench-fanout: $(STAMP) ## Measure 2,000 viewers of one API process (3 minutes)
	$(BIN)/python -m benchmarks.fanout

bench-capacity: $(STAMP) ## Measure connections, memory, disk and WAL; write the tables of docs/operations.md
	$(BIN)/python -m benchmarks.capacity
	$(BIN)/python -m benchmarks.table

bench-takeover: $(STAMP) ## Measure how soon runs go on when their processes are killed (4 minutes)
	$(BIN)/python -m benchmarks.takeover
	$(BIN)/python -m benchmarks.table

bench-waits: $(STAMP) ## Measure runs that wait: sleeps, signals, children, async steps, tokens (15 minutes); ARGS="map --size 0.1": a part, not stored
	$(BIN)/python -m benchmarks.waits $(ARGS)
	$(BIN)/python -m benchmarks.table

bench-limits: $(STAMP) ## Measure what limits let through, beside what they could (3 minutes)
	$(BIN)/python -m benchmarks.limits
	$(BIN)/python -m benchmarks.table

bench-peers: $(STAMP) ## Measure beatless beside seven other systems (20 minutes); ARGS=--quick: 3 minutes
	$(BIN)/python -m benchmarks.peers $(ARGS)

performance: $(STAMP) ## Write docs/performance.md and the table of README.md from its stored results
	$(BIN)/python -m benchmarks.peers.report

bench-%: $(STAMP)
	$(BIN)/python -m benchmarks.relay $*

test-long: $(STAMP) ## The suite with everything that takes long (stress, kills at every point)
	@mkdir -p .tmp
	TMPDIR="$(CURDIR)/.tmp" $(PYTEST) -m "long or not long" $(ARGS)

# Not of the slow and long tests: a process that is measured takes half as long again to start, and
# they start most of them.
coverage: $(STAMP) ## The suite of make test, and how much of the code it executes
	@rm -f .coverage .coverage.* && mkdir -p .tmp
	TMPDIR="$(CURDIR)/.tmp" COVERAGE_FILE="$(CURDIR)/.coverage" \
	  $(BIN)/coverage run -m pytest -n $(WORKERS) --dist worksteal $(IN_MEMORY) $(ARGS)
	@$(BIN)/coverage combine -q && $(BIN)/coverage report

check: $(STAMP) ## Format, lint, strict types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(DOCS_STAMP) ## The documents as a site, in site/: every link, docstring and menu checked, no network needed
	@mkdir -p .tmp
	$(BIN)/python .ci/site/sources.py .tmp/site
	@rm -rf site
	$(BIN)/python -m sphinx -W --keep-going -q -j auto -c .ci/site -b html .tmp/site site
	@echo "site/index.html"

$(DOCS_STAMP): $(STAMP) requirements-docs.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements-docs.txt
	@touch $(DOCS_STAMP)

architecture: $(STAMP) ## Write the tables of modules in docs/architecture.md
	$(BIN)/python -m tests.architecture docs/architecture.md

format: $(STAMP) ## Write the format that check asks for
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .

# Made with the oldest Python, whose set of packages is the largest, and without this machine's
# pip settings: neither its indexes nor its own wheels may leak into the files.
COMPILE = env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE=/dev/null \
  .venv-lock/bin/pip-compile -q --upgrade --strip-extras --allow-unsafe --generate-hashes \
  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
  --no-header --no-annotate --all-build-deps

# Django 6 needs a newer one.
DJANGO6_PYTHON ?= python3.12

lock: ## Pin what is installed, with hashes: the requirements files (needs Python 3.11, and 3.12 for DJANGO6_PYTHON)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "the lock is made with Python 3.11; try: make PYTHON=python3.11 lock" >&2; exit 2; }
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install -q --disable-pip-version-check pip-tools
	$(COMPILE) $(EXTRAS) --output-file requirements.txt pyproject.toml
	.venv-lock/bin/python .ci/floors.py > .venv-lock/floors.txt
	$(COMPILE) $(EXTRAS_OLDEST) --constraint .venv-lock/floors.txt --output-file requirements-oldest.txt pyproject.toml
	$(COMPILE) --extra docs --constraint requirements.txt --output-file requirements-docs.txt pyproject.toml
	$(DJANGO6_PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install -q --disable-pip-version-check pip-tools
	$(COMPILE) --extra dev --extra test --extra django --output-file requirements-django6.txt pyproject.toml
	@rm -rf .venv-lock
	@! grep -nE '://|^beatless|^-|WARNING' requirements*.txt

PEER_LOCKS = benchmarks/peers/locks
lock-peers: ## Pin what the peers of bench-peers and the readers of test-readers need (Python 3.11, 3.12 for Oban, npm)
	@for lock in $(PEER_LOCKS)/*.in; do \
	  python=python3.11; [ "$${lock##*/}" = oban.in ] && python=python3.12; \
	  $$python -m venv --clear .venv-lock && .venv-lock/bin/python -m pip install -q --disable-pip-version-check pip-tools && \
	  $(COMPILE) --output-file "$${lock%.in}.txt" "$$lock" || exit 1; \
	done
	@rm -rf .venv-lock
	for at in $(PEER_LOCKS)/bullmq tests/readers; do \
	  (cd $$at && npm install --package-lock-only --omit-lockfile-registry-resolved --no-audit --no-fund) || exit 1; \
	done
	@! grep -nE '://|^-|WARNING' $(PEER_LOCKS)/*.txt
	@! grep -n resolved $(PEER_LOCKS)/bullmq/package-lock.json tests/readers/package-lock.json

clean: ## Remove what the other targets made
	rm -rf .venv* .tmp .coverage* .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis \
	  build dist site *.egg-info census census-report tests/readers/node_modules $(MEMORY)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
