# The words people type. `make run` and `make test` install what they need first.

PYTHON ?= python3
VENV := .venv/bin/python
MODEL ?= tiny.en
MANIFEST ?= tests/data/speech.jsonl

.NOTPARALLEL:
.PHONY: help run test test-long check bench peers pins image-test image-test-gpu clean venv venv-test model ffmpeg browser edge-tools

help:
	@echo 'make run      transcribe test_input.json with the RunPod worker'
	@echo 'make test     install what the tests need, check the code, run all tests'
	@echo 'make test-long    the tests in a browser, behind Caddy, and those that take minutes'
	@echo 'make check    formatting, lint, types, import floors'
	@echo 'make bench    word errors, times and cold start (MANIFEST=FILE MODEL=NAME)'
	@echo 'make image-test   build the image with buildah, run it and the cluster manifests with podman (root)'
	@echo 'make image-test-gpu    build the image for GPUs and look into it; no card needed (root, some 15 GB)'
	@echo 'make peers    install other Whisper implementations into .venv-peers to compare with'
	@echo 'make pins     resolve constraints.txt again'
	@echo 'make clean    remove environments and caches; the model cache stays'

run: venv model
	$(VENV) handler.py

test: venv-test ffmpeg model check
	$(VENV) -m pytest -q

test-long: venv-test ffmpeg browser edge-tools model
	$(VENV) -m pytest -q -m long

check: venv-test
	$(VENV) -m ruff format --check .
	$(VENV) -m ruff check .
	$(VENV) -m mypy
	$(VENV) -m pytest -q tests/unit/test_floors.py

bench: venv-test model
	$(VENV) benchmarks/wer.py --manifest $(MANIFEST) --model $(MODEL)
	$(VENV) benchmarks/times.py --manifest $(MANIFEST) --model $(MODEL)
	$(VENV) benchmarks/coldstart.py --model $(MODEL)

venv:
	@$(PYTHON) scripts/setup_venv.py run

venv-test:
	@$(PYTHON) scripts/setup_venv.py test

peers:
	@$(PYTHON) scripts/setup_venv.py peers

# save_pipeline.py fills the cache in one step, so that one file of it tells that it is whole.
model:
	@test -e whisper_model_cache/model/config.json || $(VENV) save_pipeline.py --model tiny.en

# The worker can do with the ffmpeg that a Python package carries; the tests try the system's as well.
ffmpeg:
	@command -v ffmpeg >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ffmpeg; \
	  else \
	    echo 'No ffmpeg on this system: tests of it are skipped. To run them: sudo apt-get install ffmpeg'; \
	  fi; }

# For the tests of the web page: playwright's own Chromium where it can be fetched, else the system's.
browser: venv-test
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  timeout 180 $(VENV) -m playwright install --only-shell chromium >/dev/null 2>&1 || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    { timeout 60 apt-get update -qq; DEBIAN_FRONTEND=noninteractive timeout 240 apt-get install -y -qq --no-install-recommends chromium; } \
	      || echo 'Chromium could not be installed: tests of the web page are skipped.'; \
	  else \
	    echo 'No Chromium on this system: tests of the web page are skipped. To run them: sudo apt-get install chromium'; \
	  fi; }

# For the tests of the edge; without them those are skipped, and say so.
edge-tools:
	@command -v caddy >/dev/null && command -v shellcheck >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    { timeout 60 apt-get update -qq; DEBIAN_FRONTEND=noninteractive timeout 240 apt-get install -y -qq --no-install-recommends caddy shellcheck; } \
	      || echo 'caddy and shellcheck could not be installed: tests of the edge are skipped.'; \
	  else \
	    echo 'No caddy or shellcheck on this system: tests of the edge are skipped. To run them: sudo apt-get install caddy shellcheck'; \
	  fi; }

image-test: venv-test
	$(VENV) -m pytest -q -rA tests/image/check_*.py

image-test-gpu: venv-test
	$(VENV) -m pytest -q -rA tests/image/gpu_check.py

pins: venv
	$(VENV) -m pip install --quiet uv
	echo setuptools | $(VENV) -m uv pip compile --universal --python-version 3.10 --no-annotate --no-header --quiet \
	  --constraints constraints.txt requirements.txt requirements-test.txt - > constraints.new
	{ grep '^#' constraints.txt; grep -vE '^(nvidia-[^m]|cuda-|triton=)' constraints.new; } > constraints.pinned
	mv constraints.pinned constraints.txt && rm constraints.new

clean:
	@awk '$$2 ~ "^$(CURDIR)/.cache/image/" { print $$2 }' /proc/mounts | xargs -r umount # a build that was killed leaves them
	rm -rf .venv .venv-peers .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
