# make demo    set up, train on the packaged digits, evaluate, predict
# make test    set up, lint, types, all tests; CI calls exactly this
# Both install into .venv at first and reuse it afterwards. Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "normfree needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "Installing into .venv (PyTorch alone is some gigabytes) ..."
	@test -x .uv/bin/uv || $(PYTHON) -m pip install --quiet --disable-pip-version-check --root-user-action ignore --target .uv uv
	@test -x $(BIN)/python || .uv/bin/uv venv --quiet --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv
	@.uv/bin/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraints constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	@mkdir -p runs
	@run=$$(mktemp -d runs/demo-XXXX) && best=$$run/best.safetensors && set -e && \
	echo "== normfree train --out $$run" && $(BIN)/normfree train --out $$run && \
	echo && echo "== normfree eval $$best mnist5k" && $(BIN)/normfree eval $$best mnist5k && \
	echo && echo "== normfree predict $$best examples/digits" && $(BIN)/normfree predict $$best examples/digits && \
	echo && echo "Next: your own images, one folder for each class:" && \
	echo "  source .venv/bin/activate" && \
	echo "  normfree train PATH/TO/IMAGES         # PATH/TO/IMAGES/CLASS/*.jpg" && \
	echo "  normfree train --help                 # every option" && \
	echo "  tensorboard --logdir runs             # curves"

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --warnings
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

clean:
	rm -rf .venv .uv
