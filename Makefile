.PHONY: demo test test-drivers test-firecracker test-host check faults bench docs setup clean

demo:  ## set up, build the default image once, run one command on a real VM
	@scripts/demo

test: setup  ## everything: checks, unit tests, integration tests on real VMs
	@scripts/check tests

check: setup  ## format, lint, types, unit tests
	@scripts/check tests/unit

test-host: setup  ## what needs systemd, device-mapper, vsock or KVM, on a guest as the host
	@.venv/bin/python -m pytest tests/host

test-drivers: setup  ## the integration suite over the other hypervisor and the other storage
	@.venv/bin/python -m pytest tests/integration --drivers qemu+reflink
	@.venv/bin/python -m pytest tests/integration --drivers firecracker+reflink

test-firecracker: setup  ## the Firecracker driver; with the real one where it is on PATH
	@.venv/bin/python tests/firecrackers.py
	@.venv/bin/python -m pytest tests/unit/test_firecracker_machine.py tests/integration/test_firecracker_*.py
	@.venv/bin/python -m pytest --all-hosts --whole-suite tests/host/test_jails_guest.py tests/host/test_firecracker_suite_guest.py

faults: setup  ## the whole fault matrix, over all drivers; writes docs/reliability*.md
	@for drivers in qemu+qcow2 qemu+reflink firecracker+reflink; do \
		.venv/bin/python -m pytest -n 2 tests/faults --all-faults --drivers $$drivers || exit; \
	done

bench: setup  ## measure, print a table, write bench/results.json
	@.venv/bin/python -m bench

docs: setup  ## write the pages that are made from the code
	@.venv/bin/python -c 'from banger.base.config import markdown; print(markdown(), end="")' >docs/config.md

setup:  ## system packages and .venv with the development tools
	@scripts/setup --dev

clean:  ## what was built here; banger's own state (images, VMs) stays
	rm -rf .venv build dist src/banger/guest/bin bench/results.json
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
