# Both `make demo` and `make test` set up everything they need in $(VENV) first.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
SUBJECTS ?= 1500
PRETRAIN_STEPS ?= 150
TUNE_STEPS ?= 800
WHEN_STEPS ?= 100
TRIALS ?= 4
ICU ?= build/icu
QUICK ?=
# of tests, side by side: one more than cores, for each waits for Ray now and then; each takes up to 5 GB
PROCESSES ?= 3
BIN = $(VENV)/bin
PY = $(BIN)/python
# the versions that the suite last passed with; CONSTRAINTS=/dev/null for the newest that pyproject.toml takes
CONSTRAINTS ?= constraints.txt
PIP = $(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint $(CONSTRAINTS) $(PIP_ARGS)
# the tests of a file run in one process; what took longest is said at the end. Ray's workers would wait for the tests
PYTEST = OMP_NUM_THREADS=1 RAY_worker_niceness=0 $(PY) -m pytest -q -n $(PROCESSES) --dist loadfile --no-loadscope-reorder --durations=15

# many tests compute in float64: compiled once here, not in each of their processes
DOUBLE = $(PY) -m hymate.ops.cpu.precompile float64

# a virtual environment where there is one; a machine with a GPU may have its own Python with torch, and no internet
ANY_PY = $(if $(wildcard $(PY)),$(PY),$(PYTHON))

GPU_PYTHON ?= 3.12

# an image may say otherwise; then each command, worker and test process compiles all that it imports
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo icu check test constraints test-gpu kernels wheels test-faults bench docs figures clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch>=2.6,<2.14"
	$(PIP) --editable ".[dev]"
	@$(PY) -m compileall -q -j 0 $(VENV)/lib > /dev/null || true  # what pip does on one core; some packages hold broken files
	$(PY) -m hymate.ops.cpu.precompile
	@touch $@

demo: $(VENV)/.installed
	@echo "1/4  a synthetic cohort whose readmissions follow a known law"
	@$(PY) -m hymate.data.prepare source=synthetic out=$(DEMO)/data synthetic.subjects=$(SUBJECTS) synthetic.mean_events=250
	@echo "2/4  pretraining: 2 Ray workers, DeepSpeed ZeRO-2"
	@$(PY) pretrain/run.py data.path=$(DEMO)/data model=debug train=zero2 train.num_workers=2 \
		data.context=512 data.tokens_per_row=4096 train.learning_rate=3e-3 train.max_steps=$(PRETRAIN_STEPS) train.eval_every=50 \
		train.eval_rows=8 run.dir=$(DEMO)/runs run.name=pretrain
	@echo "3/4  whether: fine-tuning for readmission, a search over $(TRIALS) trials that learn from gradient boosting, too"
	@$(PY) finetune/tune.py task=readmission data.path=$(DEMO)/data init=$(DEMO)/runs/pretrain search=quick \
		search.num_trials=$(TRIALS) data.context=256 data.tokens_per_row=4096 train.rows_per_step=1 train.max_steps=$(TUNE_STEPS) train.eval_every=100 \
		report.ensemble=true run.dir=$(DEMO)/runs run.name=readmission
	@echo "4/4  when: the network of step 3 learns when a patient comes back or dies"
	@$(PY) finetune/tune.py task=time_to_readmission data.path=$(DEMO)/data init=$(DEMO)/runs/readmission search=quick \
		search.num_trials=1 search.space.teacher_fraction=0 data.context=256 data.tokens_per_row=4096 train.rows_per_step=1 \
		train.max_steps=$(WHEN_STEPS) train.eval_every=100 run.dir=$(DEMO)/runs run.name=time_to_readmission

# the encoder that ships as init=icu, of the files of both challenges; hymate/bundles/icu/README.md is written by hand
icu: $(VENV)/.installed
	@test -d "$(P2012)" && test -d "$(P2019)" || { echo "make icu P2012=DIR P2019=DIR: the files of each challenge"; exit 2; }
	$(PY) -m hymate.data.prepare source=physionet2012 raw="$(P2012)" out=$(ICU)/physionet2012
	$(PY) -m hymate.data.prepare source=physionet2019 raw="$(P2019)" out=$(ICU)/physionet2019
	$(PY) -m hymate.data.prepare source=meds 'raw=[$(ICU)/physionet2012,$(ICU)/physionet2019]' \
		'codes=[physionet2012,physionet2019]' out=$(ICU)/both
	$(PY) pretrain/run.py data.path=$(ICU)/both model=physionet objective=both objective.horizon_hours=12 train=zero0 \
		train.num_workers=2 data.context=2048 data.tokens_per_row=8192 train.max_steps=400 train.warmup_steps=40 \
		train.learning_rate=2e-3 train.eval_rows=16 run.dir=$(ICU)/runs run.name=icu
	cp $(addprefix $(ICU)/runs/icu/bundle/,model.safetensors config.yaml vocabulary.parquet) hymate/bundles/icu/

# lint, types, and the tests that are quick: before every commit
check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(DOUBLE) && $(PYTEST) -m "not slow"

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy & types=$$!; $(DOUBLE) && $(PYTEST) && wait $$types

# after a `make test CONSTRAINTS=/dev/null` that passed in a fresh environment
constraints: $(VENV)/.installed
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

# what needs a CUDA device; installs nothing and needs no Ray. Only the files that have such tests are imported.
# MAMBA_DETERMINISTIC: one variant of each kernel, for trying all of them takes minutes for every new shape
test-gpu:
	MAMBA_DETERMINISTIC=1 $(ANY_PY) -m pytest -q -m gpu -o addopts="-ra --strict-markers -p no:cacheprovider" -o filterwarnings=default \
		--continue-on-collection-errors $$(grep -rl --include='test_*.py' 'mark\.gpu' tests)

# mamba-ssm's Triton kernels (1 GB), which the tests then run on the CPU, in Triton's interpreter
kernels: $(VENV)/.installed
	$(PIP) --editable ".[kernels]" packaging setuptools wheel ninja
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(PIP) \
		--no-deps --no-build-isolation mamba-ssm==2.3.2.post1

# what a machine with a GPU and without internet may lack, for its Python; of mamba-ssm all but the compiled part
wheels:
	$(ANY_PY) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --dest wheels \
		$(foreach version,2014 _2_17 _2_28,--platform manylinux$(version)_x86_64) -r tests/benchmarks/wheels.txt
	DS_BUILD_OPS=0 MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(ANY_PY) -m pip wheel --quiet --no-deps \
		--no-build-isolation --wheel-dir wheels "deepspeed>=0.19,<0.20" antlr4-python3-runtime==4.9.3 mamba-ssm==2.3.2.post1

# processes and hosts killed, networks cut, disks filled, servers stopped: some forty minutes; ends in a table of what each
# fault costs. Hosts and small disks need root
test-faults: $(VENV)/.installed
	$(PY) -m pytest -q -o addopts="-ra --strict-markers -p no:cacheprovider" tests/faults

# the speed of mixers, encoders, streaming, loading and training, and the curve over context; QUICK=--quick for a first look
bench: $(VENV)/.installed
	$(PIP) --editable ".[bench]"
	$(PY) tests/benchmarks/mixers.py $(QUICK)
	$(PY) tests/benchmarks/peers.py $(QUICK)
	$(PY) tests/benchmarks/length.py $(QUICK)
	$(PY) tests/benchmarks/streaming.py $(QUICK)
	$(PY) -m hymate.data.prepare source=synthetic out=$(DEMO)/bench synthetic.subjects=300
	$(PY) tests/benchmarks/loader.py $(DEMO)/bench
	$(PY) tests/benchmarks/training.py $(DEMO)/bench $(QUICK)
	$(PY) -m hymate.data.prepare source=synthetic out=$(DEMO)/long synthetic.subjects=480 synthetic.mean_events=131072 \
		synthetic.driver_distance=32768 splits.train=0.6 splits.tuning=0.1 splits.held_out=0.3
	$(PY) tests/benchmarks/long_context.py $(DEMO)/long $(DEMO)/long-context $(QUICK)

docs: $(VENV)/.installed
	$(PY) docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# the pictures of docs/: the architecture, and the report of the demo
figures: demo
	$(PY) docs/draw.py $(DEMO)

clean:
	rm -rf $(VENV) $(DEMO)
