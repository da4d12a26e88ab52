# Targets that set up what they need: tiny, test, parity, format. Python 3.11, 3.12 or 3.13; PYTHON=... chooses one.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c \
  'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)

.PHONY: tiny test parity format

tiny: .venv/installed
	.venv/bin/python scripts/encode.py --shapes_world --weights weights/tiny --clips 128 --prompt_count 256 \
	  --out runs/tiny/data
	.venv/bin/python scripts/train.py --config configs/tiny.py --workdir runs/tiny
	.venv/bin/python scripts/evaluate.py --checkpoint runs/tiny --weights weights/tiny --beside_teacher --count 48 \
	  --batch_size 8 --out runs/tiny

# Three workers on two cores: tests wait for programs that they start.
test: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -n 3 --dist loadfile

parity: .venv-parity/installed
	.venv-parity/bin/python -m pytest tests/parity

format: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv/installed: EXTRAS = dev
.venv-parity/installed: EXTRAS = dev,parity
.venv/installed .venv-parity/installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 found; name one with PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	touch $@
