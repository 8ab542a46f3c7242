# make quickstart: install, then teach a new word to the small checkpoint that ships with OTL
# make test:       install, then run every test (make test ARGS="tests/test_noise.py -v" runs some)
# Both make .venv if there is none, and install again only after pyproject.toml or constraints.txt has changed.

VENV ?= .venv
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$name; break; }; done)
# Processes that run tests; each holds a torch of its own.
WORKERS ?= 2
ARGS ?=

# The networks of the quickstart and the tests are so small that threads cost more than they bring.
export OMP_NUM_THREADS ?= 1

# Containers often forbid Python to keep what it compiles: then every command would compile all that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test install
.DELETE_ON_ERROR:

quickstart: install
	$(VENV)/bin/python -m otl experiment=quickstart $(ARGS)

test: install
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

install: $(VENV)/.installed

# pip's own configuration decides between the CPU and the CUDA build of torch. Python compiles what it imports: a third
# of the 17,000 modules, all of which pip would compile, one after the other.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "OTL needs Python 3.11 or newer, and python3 is older or absent: install one, or name it with make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]"
	@touch $@
