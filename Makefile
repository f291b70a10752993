# Everything a developer or a first-time user runs. Each target sets up what it needs.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The oldest and the newest supported Triton: the kernels are compiled ahead of time with both, and
# interpreted with the newest.
TRITON_OLDEST := 3.4.0
TRITON_NEWEST := 3.9.0
TRITON := .triton
# And what torch 2.11 to 2.13 bring.
TRITON_ALL := $(TRITON_OLDEST) 3.6.0 3.7.0 3.8.0 $(TRITON_NEWEST)
# Beside the newest, which is in the environment: what LLaMA-Factory and axolotl pin.
PEFTS := 0.18.1 0.20.0
PEFT := .peft
# Beside the newest 5.17, which is in the environment: the oldest, what LLaMA-Factory and axolotl pin,
# and the newest there is. Each folder has what its release needs in other versions.
TRANSFORMERS := 4.57.6 5.6.0 5.16.1 5.24.0
TRANSFORMERS_NEED_4.57.6 := accelerate==1.11.0 tokenizers==0.22.2 huggingface_hub==0.36.2 \
    datasets==4.0.0 \
    requests==2.34.2 urllib3==2.8.0 charset-normalizer==3.5.3
# All that is the lowest, by `make test-oldest`. pandas and pyarrow: the newer ones take numpy 2 alone.
TRANSFORMERS_NEED_4.57.0 := accelerate==1.3.0 datasets==4.0.0 safetensors==0.4.3 numpy==1.26.4 \
    peft==0.18.0 tokenizers==0.22.0 huggingface_hub==0.36.2 pandas==2.2.3 pytz==2026.2 pyarrow==21.0.0 \
    requests==2.34.2 urllib3==2.8.0 charset-normalizer==3.5.3
TRANSFORMERS_NEED_5.6.0 := accelerate==1.11.0 tokenizers==0.22.2
# Real trainers, in the versions that they pin: tests/packages/NAME.txt.
PACKAGES := .packages
# What builds the documentation's site: docs/site/requirements.txt.
DOCS := .docs
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# As containers set it: each of the hundreds of processes that tests start would compile all anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo notebook train-example test test-models test-estimate test-transformers test-oldest test-oldest-torch test-versions test-compile test-torch test-triton test-pages test-trl test-axolotl test-swift test-llamafactory test-nemo test-liger test-lmms-eval test-deepspeed test-ranks docs test-docs release-check fuzz lint sanitize bench bench-compare bench-host test-gpu-first gpu-first gpu-second gpu-check gpu-step gpu-sanitize clean

help:  ## this list
	@awk -F ' *:.*## +' '/^[a-z-]+:.*## / {printf "%-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

ASK_PYTHON := import sys; v = sys.version_info; v >= (3, 11) or sys.exit("PYTHON=$(PYTHON): expected \
    Python 3.11 or newer, as constraints.txt does, got %d.%d" % v[:2])

# Build tools first: the package is built against the torch that it will run with.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*) \
    prereg_kernels/ops/backends/cpp_build.py
	@echo "Setting up $(VENV): about 5 minutes, to install PyTorch and compile the C++ kernels"
	test -x $(BIN)/python || { $(PYTHON) -c '$(ASK_PYTHON)' && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja torch numpy
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: $(READY)  ## train a small LLaVA with and without PRe on real images (7 to 20 minutes)
	$(BIN)/prereg demo

notebook: $(PACKAGES)/notebook/.ready  ## run examples/effect.ipynb, and write its outputs into it (4 minutes)
	PYTHONPATH=$(CURDIR)/$(PACKAGES)/notebook:$(CURDIR) $(BIN)/python -m tests.notebook.execute

# A LLaVA from a CLIP and a Llama, then a Qwen2.5-VL. Held out are other photographs.
EXAMPLE := runs/photographs
ASK = $(BIN)/prereg evaluate $(1) --data $(EXAMPLE)/held_out.json --images $(EXAMPLE)/images
train-example: $(READY)  ## train and evaluate a tiny LLaVA and Qwen2.5-VL on photographs (2 minutes)
	rm -rf $(EXAMPLE)
	$(BIN)/python examples/photographs.py $(EXAMPLE)
	$(BIN)/prereg assemble --vision $(EXAMPLE)/clip --llm $(EXAMPLE)/llama --out $(EXAMPLE)/llava
	$(BIN)/prereg train examples/photographs.yaml
	$(call ASK,$(EXAMPLE)/pre)
	$(BIN)/prereg train examples/photographs.yaml --model $(EXAMPLE)/qwen --out $(EXAMPLE)/qwen_pre
	$(call ASK,$(EXAMPLE)/qwen_pre)
	$(BIN)/python examples/read_back.py $(EXAMPLE)

# The whole suite runs on the C++ rows, where they are built; on plain PyTorch what computes with rows:
# the loss, the tap, and of `apply_pre` the gradients and what it keeps alive. The rest calls these;
# test-torch has all of `apply_pre`'s, and the threads.
ON_TORCH := ops benchmarks/loss attach/test_gradients.py attach/test_lifetimes.py test_import.py
ONCE := ops/backends benchmarks/loss/test_gpu.py
test: $(READY) $(TRITON)/$(TRITON_OLDEST)/.ready $(TRITON)/$(TRITON_NEWEST)/.ready $(PEFTS:%=$(PEFT)/%/.ready)
test:  ## the tests, as CI runs them (half an hour or more)
	$(BIN)/python -m pytest -n 2
	$(BIN)/python -m pytest -n 2 --backend torch $(ON_TORCH:%=tests/%) $(ONCE:%=--ignore=tests/%)
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON)/$(TRITON_NEWEST) \
	    $(BIN)/python -m pytest -n 2 tests/ops/backends/test_triton*.py
	for version in $(PEFTS); do \
	    PYTHONPATH=$(PEFT)/$$version $(BIN)/python -m pytest -n 2 tests/integrations/test_peft.py \
	        --peft $$version || exit 1; \
	done

test-torch: $(READY)  ## apply_pre, and all threads, on plain PyTorch (not timed whole)
	$(BIN)/python -m pytest -n 2 --backend torch tests/attach tests/threads

test-compile: $(READY)  ## all of torch.compile's graphs (not timed whole)
	$(BIN)/python -m pytest -n 2 -m "compiled or not compiled" tests/integrations/test_compile.py \
	    tests/attach/test_sequence_parallel.py tests/trainers/test_denominators.py

test-models: $(READY)  ## every image-text model in every scene (7 minutes)
	$(BIN)/python -m pytest -n 2 -m "matrix or not matrix" tests/zoo tests/models \
	    tests/train/test_parts.py

test-estimate: $(READY)  ## FLOPs of every image-text model against torch's counter (5 minutes, not timed whole)
	$(BIN)/python -m pytest -n 2 -m "matrix or not matrix" tests/estimate

test-triton: $(TRITON_ALL:%=$(TRITON)/%/.ready)  ## the kernels compiled with Triton 3.4 to 3.9 (10 minutes)
	PREREG_AOT=versions $(BIN)/python -m pytest -n 2 tests/triton_aot

# What meets transformers, with every release but the environment's; the demo's numbers are of that one.
MEETS_TRANSFORMERS := attach checkup cli integrations models trainers util zoo
test-transformers: $(TRANSFORMERS:%=.transformers/%/.ready)  ## with transformers 4.57 to the newest
	for version in $(TRANSFORMERS); do \
	    PYTHONPATH=.transformers/$$version:. $(BIN)/python -m pytest -n 2 --transformers $$version \
	        $(MEETS_TRANSFORMERS:%=tests/%) || exit 1; \
	done

# The lowest versions that pyproject.toml takes, on the environment's torch. tests/trainers has more
# that 4.57 fails, with any accelerate: docs/install.md.
OLDEST := 4.57.0
test-oldest:  ## with the lowest transformers, accelerate, safetensors, numpy and peft (not timed whole)
	$(MAKE) test-transformers TRANSFORMERS=$(OLDEST) \
	    MEETS_TRANSFORMERS="ops attach integrations/test_peft.py trainers/test_weights.py"

test-oldest-torch:  ## with torch 2.8, whose CUDA build it installs (some GB)
	$(MAKE) test-versions RELEASES="torch==2.8.0 transformers==4.57.6"

# Without the pins, in an environment of its own: what the package asks for, on this PYTHON. -e builds
# the C++ kernels against that torch, so this is for a clone; `prereg build` brings others' back.
# Types are checked against the pinned packages' stubs alone: numpy's for Python 3.10 are others.
RELEASES ?= torch transformers
VERSIONS := .versions
IN_VERSIONS := ops attach trainers integrations/test_compile.py
test-versions:  ## ruff and tests on PYTHON with RELEASES="torch==2.8.0 transformers==4.57.6", unpinned
	rm -rf $(VERSIONS)
	$(PYTHON) -m venv $(VERSIONS)
	$(VERSIONS)/bin/python -m pip install -q 'setuptools>=77' wheel ninja numpy $(RELEASES)
	$(VERSIONS)/bin/python -m pip install -q --no-build-isolation -e '.[dev]' $(RELEASES)
	$(VERSIONS)/bin/python -m pip list
	$(VERSIONS)/bin/ruff check .
	$(VERSIONS)/bin/ruff format --check .
	$(VERSIONS)/bin/python -m pytest -n 2 $(IN_VERSIONS:%=tests/%)

# The suite draws the same few examples on every run, this others, FUZZ times as many. A failure ends
# with the line that repeats it, and is tried first the next time.
FUZZ ?= 100
fuzz: $(READY)  ## the fuzzers with 100 times the examples, some hours (FUZZ=10 for ten times)
	FUZZ=$(FUZZ) $(BIN)/python -m pytest -n 2 -m fuzz

# Beside the environment, not in it: on CPUs the package has to work without Triton.
$(TRITON)/%/.ready: constraints.txt | $(READY)
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --no-deps --target $(@D) triton==$*
	touch $@

$(PEFT)/%/.ready: constraints.txt | $(READY)
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --no-deps --target $(@D) peft==$*
	touch $@

# By --no-deps: the file names all that differs from the environment, and what that lacks.
$(PACKAGES)/%/.ready: tests/packages/%.txt | $(READY)
	rm -rf $(@D)
	# --upgrade: rouge has a package named bin, in whose place the programs go.
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(@D) -r $<
	# What is compiled in these looks for CUDA as it is imported, and is not needed here.
	rm -rf $(@D)/torchaudio/lib
	! test -d $(@D)/torchvision || : > $(@D)/torchvision/_meta_registrations.py
	touch $@

test-llamafactory: $(PACKAGES)/llamafactory/.ready  ## PRe in LLaMA-Factory, by its own command (4 minutes)
	$(BIN)/python -m pytest -m packages tests/packages/test_llamafactory.py

test-trl: $(PACKAGES)/trl/.ready  ## PRe in TRL, by its own command (18 minutes beside other work)
	$(BIN)/python -m pytest -m packages tests/packages/test_trl.py
	PYTHONPATH=$(PACKAGES)/trl:. $(BIN)/python -m pytest tests/packages/with_trl.py

test-axolotl: $(PACKAGES)/axolotl/.ready  ## PRe in axolotl, by its own command (4 minutes beside other work)
	$(BIN)/python -m pytest -m packages tests/packages/test_axolotl.py

test-swift: $(PACKAGES)/swift/.ready  ## PRe in ms-swift, by its own command (4 minutes beside other work)
	$(BIN)/python -m pytest -m packages tests/packages/test_swift.py

test-nemo: $(PACKAGES)/nemo/.ready  ## PRe in NeMo AutoModel's own recipe (8 minutes beside other work)
	$(BIN)/python -m pytest -m packages tests/packages/test_nemo.py

test-liger: $(PACKAGES)/liger/.ready  ## PRe beside Liger's patched forward (3 minutes beside other work)
	$(BIN)/python -m pytest -m packages tests/packages/test_liger.py

test-deepspeed: $(PACKAGES)/deepspeed/.ready  ## ZeRO-2 and ZeRO-3 on two CPU ranks (7 minutes)
	DS_ACCELERATOR=cpu PYTHONPATH=$(PACKAGES)/deepspeed:. $(BIN)/python -m pytest -m packages \
	    tests/train/test_deepspeed.py tests/trainers/test_deepspeed.py \
	    tests/trainers/test_accelerate_configs.py

test-ranks: $(READY)  ## ranks that fail, FSDP2, SLURM's script, examples, on two CPU ranks (13 minutes)
	$(BIN)/python -m pytest -m ranks tests/train tests/trainers

test-lmms-eval: $(PACKAGES)/lmms_eval/.ready  ## prereg evaluate through lmms-eval, on local files (2 minutes)
	$(BIN)/python -m pytest -m packages tests/packages/test_lmms_eval.py

# Debian's Chromium; elsewhere CHROMIUM names one. Where neither is there, the tests fail.
test-pages: $(PACKAGES)/pages/.ready  ## the checkup's page and the demo's in a browser (2 minutes)
	command -v "$${CHROMIUM:-chromium}" >/dev/null || { \
	    sudo=$$(test "$$(id -u)" = 0 || echo sudo); $$sudo apt-get -qq update && \
	    $$sudo apt-get -qq install --no-install-recommends chromium >/dev/null; }
	PYTHONPATH=$(CURDIR)/$(PACKAGES)/pages:$(CURDIR) $(BIN)/python -m pytest -m pages tests/pages

$(DOCS)/.ready: docs/site/requirements.txt | $(READY)
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --no-deps --target $(@D) -r $<
	touch $@

docs: $(DOCS)/.ready  ## the documentation as a site, in build/site (1 minute)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=$(DOCS):. $(BIN)/python -m mkdocs build -q --strict

test-docs: docs  ## the site's pages are whole, and load nothing from elsewhere (1 minute)
	$(BIN)/python -m pytest -m "site or not site" tests/docs/test_site.py

# Without isolation: an environment of the build's own has no torch, and the wheel no C++ kernels. The
# wheel is built from the sdist.
RELEASE := build/release
release-check: $(PACKAGES)/release/.ready  ## a release but for its upload: files, checks, notes (13 minutes)
	rm -rf $(RELEASE)
	PYTHONPATH=$(CURDIR)/$(PACKAGES)/release $(BIN)/python -m build --no-isolation --outdir $(RELEASE)/dist
	PYTHONPATH=$(CURDIR)/$(PACKAGES)/release $(BIN)/python -m twine check --strict $(RELEASE)/dist/*
	$(BIN)/python -m tests.release.files > $(RELEASE)/notes.md
	$(BIN)/python -m tests.release.figures > $(RELEASE)/figures.md
	$(BIN)/python -m pytest -m "release or not release" tests/release

.transformers/%/.ready: constraints.txt Makefile | $(READY)
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --no-deps --target $(@D) transformers==$* $(TRANSFORMERS_NEED_$*)
	touch $@

lint: $(READY)  ## ruff, mypy, codespell, and actionlint on the workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/actionlint

# The sanitizers' runtimes have to be there before Python. Leaks are Python's own, at its exit.
SANITIZED := build/sanitize
sanitize: $(READY)  ## the tests of the compiled code under the address and UB sanitizers
	rm -rf $(SANITIZED)
	CXXFLAGS='-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O0' \
	    LDFLAGS='-fsanitize=address,undefined' \
	    $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	cp -r tests pyproject.toml $(SANITIZED)/lib
	cd $(SANITIZED)/lib && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	    $(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider -rs tests/ops/backends/test_cpp.py

# Beside what is tracked: RESULTS=benchmarks/results writes the files that README's tables are made of.
RESULTS := build/bench
bench: $(READY)  ## the benchmarks on this machine (16 minutes); prints a table, writes build/bench/
	mkdir -p $(RESULTS)
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds \
	    --benchmark-json=$(RESULTS)/cpu.json
	$(BIN)/python -m benchmarks.loss.cpu_table $(RESULTS)/cpu.json

# Of both the rows are compiled first, the first time.
bench-compare: $(READY)  ## time and memory against another revision, in turns (BASE=REV; 4 minutes)
	@test -n "$(BASE)" || { echo "BASE=REVISION: against which?"; exit 2; }
	$(BIN)/python -m benchmarks.compare $(BASE) --out $(RESULTS)/compare.json

# Triton compiles for a GPU that is not there, and its launches do nothing.
bench-host: $(TRITON)/$(TRITON_NEWEST)/.ready  ## the host's time of a call against another revision (BASE=REV; 4 minutes)
	@test -n "$(BASE)" || { echo "BASE=REVISION: against which?"; exit 2; }
	PYTHONPATH=$(TRITON)/$(TRITON_NEWEST):. $(BIN)/python -m benchmarks.host $(BASE) \
	    --out $(RESULTS)/host.json

test-gpu-first: $(READY)  ## a dry run of gpu-first and gpu-second on the CPU (7 minutes beside other work)
	$(BIN)/python -m pytest -m dry tests/benchmarks/first

# On a GPU machine the system python has torch and triton already: no virtual environment there.
# The benchmark runs whatever the tests say; the last line says which of the two failed.
# ROCm's rocm-smi succeeds without a GPU too, so that torch is asked there.
ASK_ROCM := import torch; raise SystemExit(not (torch.version.hip and torch.cuda.is_available()))
HAS_GPU = { command -v nvidia-smi && nvidia-smi \
    || { command -v rocm-smi || test -e /dev/kfd; } && $(PYTHON) -c "$(ASK_ROCM)"; } >/dev/null 2>&1
gpu-first gpu-second gpu-check gpu-step gpu-sanitize: export PYTHONPATH := .$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu-first:  ## what a new GPU should answer first (at most 560 s); files go to OUT or build/bench
	@if $(HAS_GPU); then timeout --kill-after 5 555 \
	        $(PYTHON) -m benchmarks.first first --out $${OUT:-$(RESULTS)}; \
	else echo "gpu-first: no GPU on this machine, nothing was run"; fi

WHAT ?= peers
gpu-second:  ## then the compiled peers, or Qwen's step (at most 200 s; WHAT=peers or qwen)
	@if $(HAS_GPU); then timeout --kill-after 3 197 \
	        $(PYTHON) -m benchmarks.first second --what $(WHAT) --out $${OUT:-$(RESULTS)}; \
	else echo "gpu-second: no GPU on this machine, nothing was run"; fi

gpu-check:  ## the GPU tests and benchmark (8 minutes at most); says so where there is no GPU
	@if $(HAS_GPU); then \
	    out=$${OUT:-$(RESULTS)}; mkdir -p $$out; tests=passed; benchmark=passed; \
	    workers=$$($(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 6"); \
	    timeout --signal INT --kill-after 10 170 $(PYTHON) -m pytest tests/gpu $$workers \
	        --durations 10 --junitxml $$out/gpu_tests.xml || tests=FAILED; \
	    timeout --kill-after 10 290 $(PYTHON) -m benchmarks.loss.gpu --out $$out/gpu.json \
	        || benchmark=FAILED; \
	    echo "gpu-check: tests $$tests, benchmark $$benchmark"; \
	    test $$tests$$benchmark = passedpassed; \
	else echo "gpu-check: no GPU on this machine, nothing was run"; fi

# Expandable segments: the variants ask for blocks of other sizes, and a cache in pieces would make
# the allocator free and ask again within a step.
MODEL ?= llava
gpu-step:  ## a 7B training step with and without PRe (8 minutes at most; MODEL=llava or qwen)
	@if $(HAS_GPU); then \
	    out=$${OUT:-$(RESULTS)}; mkdir -p $$out; \
	    PYTORCH_ALLOC_CONF=expandable_segments:True timeout --kill-after 10 480 \
	        $(PYTHON) -m benchmarks.step.gpu --model $(MODEL) --out $$out/gpu_step_$(MODEL).json; \
	else echo "gpu-step: no GPU on this machine, nothing was run"; fi

# Of our kernels alone: their names end in _kernel. The first run compiles them.
gpu-sanitize:  ## compute-sanitizer's memcheck and racecheck on a small case, where there is a GPU
	@if ! ($(HAS_GPU)); then echo "gpu-sanitize: no GPU on this machine, nothing was run"; \
	elif ! command -v compute-sanitizer >/dev/null 2>&1; then \
	    echo "gpu-sanitize: no compute-sanitizer on this machine, nothing was run"; \
	else \
	    $(PYTHON) tests/gpu/sanitize_case.py || exit 1; code=0; \
	    for tool in memcheck racecheck; do \
	        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 300 compute-sanitizer --tool $$tool \
	            --kernel-name kns=_kernel --error-exitcode 1 \
	            $(PYTHON) tests/gpu/sanitize_case.py || code=1; \
	    done; \
	    exit $$code; \
	fi

clean:  ## remove the environment, build products and caches (not runs/)
	rm -rf $(VENV) $(TRITON) $(PEFT) $(PACKAGES) $(DOCS) $(VERSIONS) .transformers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
