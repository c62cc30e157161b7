# make quickstart   train a latent denoising diffusion GAN on StackedMNIST, sample from it, measure it
# make compare      train small diffusion GANs and their baselines on the quickstart's latents, compare them (2 hours)
# make test         formatting, lint, types, tests
# Each makes .venv and installs what it needs first. PYTHON=python3.12 make ... chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

DATA := data/stacked_mnist
RUNS := runs/stacked_mnist
SAMPLES := samples/stacked_mnist

.PHONY: quickstart compare test lint

quickstart: $(BIN)/.installed-quickstart
	test -d $(DATA) || $(BIN)/python data_prep/make_shards.py stacked_mnist --out $(DATA)
	$(LAUNCH) autoencoder/train.py --config configs/autoencoder/stacked_mnist.yaml
	$(BIN)/python autoencoder/encode.py --autoencoder $(RUNS)/autoencoder --data $(DATA) --out $(DATA)_latents
	$(LAUNCH) ldgan/train.py --latent --config configs/ldgan/stacked_mnist.yaml
	test -d $(SAMPLES) || $(LAUNCH) ldgan/sample.py --checkpoint $(RUNS)/gan --num-images 64 --out $(SAMPLES)
	$(BIN)/python ldgan/evaluate.py --checkpoint $(RUNS)/gan --metrics modes
	@echo "64 samples and their grid: $(SAMPLES)/grid.png"

# Nine runs of about eight minutes each on one CPU core; each is left alone where it has finished before.
SMALL := ldgan/train.py --latent --config configs/ldgan/stacked_mnist_small.yaml run.num_threads=1

compare: quickstart
	for T in 1 2 4 8; do $(LAUNCH) $(SMALL) num_timesteps=$$T run.dir=$(RUNS)/T$$T || exit 1; done
	for T in 1 2 4; do $(LAUNCH) $(SMALL) num_timesteps=$$T generator.z_dim=0 run.dir=$(RUNS)/T$${T}_no_z || exit 1; done
	$(LAUNCH) ldgan/train_ddpm.py --latent --config configs/ldgan/stacked_mnist_ddpm.yaml run.num_threads=1
	$(LAUNCH) ldgan/train_ddpm.py --latent --config configs/ldgan/stacked_mnist_iddpm.yaml run.num_threads=1
	$(BIN)/python ldgan/compare.py --config configs/compare/stacked_mnist.yaml --out $(RUNS)/comparison

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(BIN)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(BIN)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@
