# Each target works on a fresh machine (Debian or Ubuntu with Python 3.11 or newer, git and make); the rest is installed.

.PHONY: queues-table help install demo test test-long check bench bench-brokers servers lock clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: ## .venv/bin/kassa, from the lock file
	@scripts/install.sh

demo: install ## one payment from beginning to end, narrated
	@.venv/bin/kassa demo

test: ## all tests but the long ones (at most 15 minutes)
	@scripts/test.sh

test-long: ## the long seeds, kills and backlogs (about 50 minutes on two quick cores)
	@scripts/test.sh -m long --verbose --durations 10 -o faulthandler_timeout=4000

check: ## format, lint, types, layers, queries, pure tests
	@scripts/check.sh

bench: ## the figures of the README, measured here
	@scripts/install.sh dev
	@scripts/apt.sh wrk
	@.venv/bin/python -m benchmarks

bench-brokers: ## kassa-brokers.html: which queue to choose, from real servers, kills included (under 6 minutes)
	@scripts/install.sh dev
	@.venv/bin/python -m benchmarks.which_queue

servers: ## real PostgreSQL, RabbitMQ, Kafka and RocketMQ, started until `python -m servers stop`
	@scripts/install.sh dev
	@.venv/bin/python -m servers start

queues-table: ## docs/reference/binders.md again, from a run of the binders' suite on real servers
	@scripts/test.sh tests/conformance/messaging --binders-table docs/reference/binders.md

lock: ## the lock files again, from pyproject.toml
	@scripts/install.sh dev
	@scripts/lock.sh

clean: ## all that was made here
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
