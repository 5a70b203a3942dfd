# make quickstart    install, train a small model on handwritten digits, sample, score     (MODEL=SiT-S/4 for attention)
# make real          the ImageNet recipe on a small scale: photographs of hands, about 20 minutes (SIGNS, TAESD, INCEPTION)
# make test          install, run the whole test suite
# make test-lowest   the same with the lowest versions that pyproject.toml allows, in an environment of its own
# make gpu           what only a GPU can tell: its tests and the benchmarks, in eight minutes at most; installs nothing
# VENV=path and LOWEST=path share the environments between clones; TESTS='-m "not slow"' chooses among the tests.

VENV   ?= .venv
LOWEST ?= .venv-lowest
PYTHON ?= python3
MODEL  ?= SiT-ATConv-S/4
STEPS  ?= 2400
COUNT  ?= 890
# Digits are enlarged so that every patch size from 2 on gives 4x4 tokens, and a step takes the same time for each.
SIZE   ?= $(if $(filter %/8,$(MODEL)),32,$(if $(filter %/4,$(MODEL)),16,8))
RUN    ?= runs/quickstart-$(subst /,-,$(MODEL))
# For make real: a zip of class folders, a diffusers AutoencoderTiny, and Inception weights for the scores.
SIGNS     ?= ../shared/data/sign-language-digits_10x206_100px.zip
TAESD     ?= ../shared/data/taesd
INCEPTION ?= ../shared/data/inception-2015-12-05_completed_fp16.pth
HANDS     ?= runs/real
TESTS   ?=
# CI sets VERDICT=- so that make ignores the verdict on a run too short to pass.
VERDICT ?=

BIN    := $(VENV)/bin
CORES  := $(shell getconf _NPROCESSORS_ONLN)
# One process. Options are given so that accelerate does not warn about its defaults, nor use only one core of a CPU.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
          --num_cpu_threads_per_process $(CORES)

# Installs the versions of a lock file unless the environment already has them: (environment, Python, lock file).
define install
@test -x $(1)/bin/python || $(2) -m venv $(1)
@cmp -s $(3) $(1)/requirements.lock || \
    { $(1)/bin/python -m pip install --quiet --disable-pip-version-check -r $(3) && cp $(3) $(1)/requirements.lock; }
endef

.PHONY: quickstart real test test-lowest gpu lint format env lock lock-lowest

quickstart: env
	$(LAUNCH) train.py --config configs/quickstart.yaml --run $(RUN) --model.name $(MODEL) --data.path digits:train@$(SIZE) \
	    --training.steps $(STEPS)
	$(LAUNCH) sample.py --checkpoint $(RUN)/checkpoints/latest/model --out $(RUN)/generated --num-samples $(COUNT) \
	    --labels balanced --guidance 1.1 --solver heun --steps 10 --batch-size 128
	$(LAUNCH) evaluate_fid.py --features pixels --samples $(RUN)/generated/samples.npz --reference digits:heldout@$(SIZE) \
	    --json $(RUN)/generated/scores.json
	$(VERDICT)$(BIN)/python -m sit_atconv.evaluation.digits $(RUN)/generated/samples.npz --json $(RUN)/generated/verdict.json
	@echo "The pictures (rows are the classes 0 to 9): $(RUN)/generated/grid.png"

real: env
	$(BIN)/python -m sit_atconv.data.prepare $(SIGNS) $(HANDS)/data --resolution 128 --vae $(TAESD) --flip --images \
	    --shard-size 512 --teacher vit_tiny_patch16_224 --teacher-weights random --verify
	$(LAUNCH) train.py --config configs/signs128.yaml --run $(HANDS)/run --data.path $(HANDS)/data
	$(LAUNCH) sample.py --checkpoint $(HANDS)/run/checkpoints/latest/model --out $(HANDS)/generated --num-samples 500 \
	    --labels balanced --guidance 1.5 --solver heun --steps 12
	$(LAUNCH) evaluate_fid.py --samples $(HANDS)/generated/samples.npz --reference $(HANDS)/data --weights $(INCEPTION) \
	    --json $(HANDS)/generated/scores.json
	@echo "The hands (rows are the digits 0 to 9): $(HANDS)/generated/grid.png"

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TESTS)

test-lowest:
	$(call install,$(LOWEST),python3.11,requirements-lowest.lock)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 $(TESTS)

gpu:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env:
	$(call install,$(VENV),$(PYTHON),requirements.lock)

# Locks the newest versions that pyproject.toml allows, for every Python from 3.10 on; [tool.uv] there limits torch.
lock: env
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra eval --extra dev --universal --python-version 3.10 \
	    --no-header --no-annotate --upgrade --output-file requirements.lock

# Locks the lowest versions that pyproject.toml allows, for Linux and Python 3.11, and the newest of indirect dependencies.
# --no-config: [tool.uv] would limit torch to a newer version.
lock-lowest: env
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra eval --extra dev --resolution lowest-direct --no-config \
	    --python-version 3.11 --python-platform linux --no-header --no-annotate --upgrade \
	    --output-file requirements-lowest.lock
