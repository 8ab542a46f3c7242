# just --list shows these; `make quickstart` and `make test` are all that a user needs

set positional-arguments

export OMP_NUM_THREADS := env("OMP_NUM_THREADS", "1")
bin := justfile_directory() / ".venv/bin"

# all tests, or those named
test *args:
    make install
    "{{bin}}/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

lint:
    "{{bin}}/ruff" check .
    "{{bin}}/ruff" format --check .

# the lower floors
types:
    "{{bin}}/mypy"

format:
    "{{bin}}/ruff" check --fix .
    "{{bin}}/ruff" format .

quickstart *args:
    make install
    "{{bin}}/python" -m otl experiment=quickstart "$@"

# OTL beside a bare loop, on this machine
bench name="train" *args:
    "{{bin}}/python" -m "benchmarks.{{name}}" {{args}}

# README and docs against the code: lines that compose, links that exist
docs:
    "{{bin}}/python" -m pytest tests/test_readme.py
