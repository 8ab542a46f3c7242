"""`python -m otl`."""

from otl.cli import main

if __name__ == "__main__":
    main()
