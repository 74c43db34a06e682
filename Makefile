.PHONY: demo test lint clean environment

python := .venv/bin/python

# `python -m torch.distributed.run` is torchrun, also where torch lies outside .venv.
demo: environment
	OMP_NUM_THREADS=1 $(python) -m torch.distributed.run --standalone --nproc_per_node=2 \
		test/test_ring_flash_attn_comparison.py

test: environment
	$(python) -m pytest $$($(python) -c 'import xdist; print("-n 2 --dist loadfile --no-loadscope-reorder")' 2>/dev/null)

lint: environment
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m pyright

clean:
	rm -rf .venv .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

environment:
	@.ci/environment
