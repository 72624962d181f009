# The front door. A target brings what it needs: on a fresh machine with Python 3.11 or newer, `make demo` and `make test` are the whole set-up.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
INVENTORY ?= local

.PHONY: help demo test lint test-service test-demo test-rules test-inventory flows test-faults faults test-fleet test-single test-judges test-interrupted test-long fleet fleet-destroy fleet-tools bench locks clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/demo.stamp ## run the whole service on this computer, without root, until Ctrl-C (ARGS="--check", "--fresh", "--help")
	@$(BIN)/neoforge demo $(ARGS)

test: lint test-rules test-inventory test-service test-demo test-faults ## everything: lint, alert rules, inventories, service, demo, faults, the fleet on one machine and on seven
	@.ci/fleet-or-say-so

lint: .venv/development.stamp ## ruff, mypy, ansible-lint, yamllint, shellcheck, and the example inventories
	$(BIN)/ruff check service tests roles playbooks molecule
	$(BIN)/ruff format --check service tests roles playbooks molecule
	$(BIN)/mypy
	$(BIN)/yamllint --strict .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-lint --offline
	set -e; for name in prod staging single local local-single; do \
	    PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-playbook playbooks/inventory.yml -i "inventories/$$name"; done
	git ls-files ':!*.j2' | xargs grep -lE --directories=skip '^#!/bin/(ba)?sh' | xargs $(BIN)/shellcheck

test-service: .venv/development.stamp ## the service against real PostgreSQL, Valkey and Postfix
	@.ci/postfix
	$(BIN)/pytest tests/service --ignore tests/service/test_demo.py $(ARGS)

test-demo: .venv/development.stamp ## the demo, end to end
	$(BIN)/pytest tests/service/test_demo.py

test-rules: ## the alert rules: each fires where it should, and only there
	.ci/promtool check rules files/prometheus/*.rules.yml
	.ci/promtool test rules files/prometheus/*.rules.test.yml

test-faults: .venv/development.stamp ## the most telling rows of the fault laboratory
	$(BIN)/pytest -o faulthandler_timeout=600 tests/faults

test-inventory: .venv/development.stamp ## mistakes in an inventory, what is made of the flow table, the module `files`; no machine is asked
	$(BIN)/pytest tests/inventory $(ARGS)

flows: .venv/development.stamp ## draw the flow table of inventories/prod in docs/fleet.md
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-playbook playbooks/flows.yml -i inventories/prod --extra-vars "flows_file=$(CURDIR)/docs/fleet.md"

faults: .venv/development.stamp ## kill and break everything at every await, count each message, write docs/fault-report.md (ARGS="--only PATTERN", "--list", "--help")
	@.ci/fault-tools
	@$(BIN)/python -m tests.faults $(ARGS)

# Machines of their own, so that those of `make fleet` stay.
test-fleet: export FLEET_SET ?= 8
test-fleet: .venv/development.stamp fleet-tools ## seven test machines on Debian 13: create, check, converge, converge again, verify, destroy
	@PATH="$(CURDIR)/$(BIN):$$PATH" .ci/scenario fleet

test-single: export FLEET_SET ?= 9
test-single: .venv/development.stamp fleet-tools ## the same with everything on one machine, on Debian 12
	@PATH="$(CURDIR)/$(BIN):$$PATH" .ci/scenario default

test-judges: .venv/development.stamp ## ssh-audit, sslyze, Lynis and OpenSCAP on a running fleet (INVENTORY=local-single: one machine)
	@.ci/judges $(PYTHON)
	FLEET_JUDGES=yes FLEET_INVENTORY=inventories/$(INVENTORY) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -o faulthandler_timeout=600 tests/fleet/test_security.py $(ARGS)

test-interrupted: .venv/development.stamp ## kill twenty runs of site.yml on a running fleet; each time the next converges, and the one after changes nothing; docs/interrupted-report.md (INVENTORY=local-single)
	FLEET_INVENTORY=inventories/$(INVENTORY) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.fleet.interrupted --each 20 $(ARGS)

test-long: ## what takes longer than `make test` may
	$(MAKE) fleet test-judges test-interrupted fleet-destroy INVENTORY=local-single
	FLEET_DEBIAN=12 $(MAKE) fleet test-judges fleet-destroy INVENTORY=local-single

fleet: .venv/development.stamp fleet-tools ## test machines on this computer, with site.yml run on them (INVENTORY=local-single: one machine)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-playbook molecule/default/create.yml -i inventories/$(INVENTORY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-playbook site.yml tests/fleet/sink.yml -i inventories/$(INVENTORY) $(ARGS)

fleet-destroy: .venv/development.stamp ## take the test machines away
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-playbook molecule/default/destroy.yml -i inventories/$(INVENTORY)

fleet-tools: ## the programs that test machines need (root)
	@.ci/fleet-tools

locks: ## compile requirements/*.txt anew from pyproject.toml
	sh requirements/compile.sh $(ARGS)

clean: ## remove what the targets made here
	rm -rf .venv dist .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

# One virtual environment; the development set is a superset of the demo's.
.venv/demo.stamp: requirements/demo.txt pyproject.toml
	@.ci/venv $(PYTHON) demo
.venv/development.stamp: requirements/development.txt pyproject.toml
	@.ci/venv $(PYTHON) development
