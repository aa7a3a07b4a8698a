# The two commands of the README: `make pretrain` and `make test`. Each sets up what is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/pretrain_sample
RECORDS := runs/records
SLOW_PARTS := train multiprocess launch parallel golden
SOURCES := triples worldcereal worldcereal_pixels worldcereal_monthly cropharvest benv2 pastis treesatai flair2

.PHONY: env pretrain records test test-slow goldens lint format lock

env: $(VENV)/.installed

# The lock names every version; the project itself is installed without looking at its own looser bounds again.
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "skyjax needs Python 3.11 or newer, this is " + sys.version.split()[0]'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# Records from the real files in data/sample, one folder a source; EuroSAT is a folder of class folders.
records: $(SOURCES:%=$(RECORDS)/%/dataset.json) $(RECORDS)/eurosat/dataset.json $(RECORDS)/rsvqa_lr/train/dataset.json

$(RECORDS)/eurosat/dataset.json: data/class_folder.py | env
	$(BIN)/skyjax data build --source=$< --input=data/sample/eurosat_rgb/train --out=$(@D)

$(RECORDS)/rsvqa_lr/train/dataset.json: data/rsvqa.py | env
	$(BIN)/skyjax data build --source=$< --input=data/sample/rsvqa_lr --out=$(RECORDS)/rsvqa_lr

$(RECORDS)/%/dataset.json: data/%.py | env
	$(BIN)/skyjax data build --source=$< --input=data/sample/$* --out=$(@D)

pretrain: records
	$(BIN)/skyjax train --config=configs/pretrain_sample.py --workdir=$(RUN)
	$(BIN)/skyjax eval --checkpoint=$(RUN) --task=knn --dataset=data/sample/eurosat_rgb
	$(BIN)/skyjax eval --checkpoint=$(RUN) --task=linear --dataset=data/sample/eurosat_rgb
	$(BIN)/skyjax report --workdir=$(RUN)

test: env lint
	$(BIN)/python -m pytest -m "not slow"

# Each part takes less than an hour; `make test-slow-train` runs one. docs/verification.md keeps the last result.
test-slow: $(SLOW_PARTS:%=test-slow-%)

test-slow-%: env
	$(BIN)/python -m pytest -m slow -n 0 tests/$*

# Where arrays live and what chips send each other, as agreed on; tests compare with it. PARTS=state takes seconds,
# PARTS="state small" minutes, all of it an hour and 6 GB: SkySense at full size is compiled for each topology.
goldens: env
	$(BIN)/python tests/golden/write_goldens.py $(PARTS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# After changing a dependency in pyproject.toml: resolve anew and write down what was chosen, whatever build of torch.
lock:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -e ".[dev]"
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > requirements.lock
