.PHONY: setup demo test gpu wheel docs
PYTHON := .venv/bin/python

setup:  ## make or refresh .venv (idempotent; a no-op when nothing changed)
	@bash scripts/setup.sh

demo: setup  ## the main job end to end on a real model
	@$(PYTHON) -m crepe_llm demo

test: setup  ## lint, types and every test this machine can run
	@bash scripts/test.sh

gpu:  ## what only a GPU can show, into gpu.json; needs torch, Triton and transformers, and fetches nothing
	@bash scripts/gpu.sh

wheel: setup  ## dist/: the source distribution and manylinux wheels that auditwheel has checked
	@bash scripts/wheel.sh

docs: setup  ## site/: the documentation as web pages, links checked
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet
