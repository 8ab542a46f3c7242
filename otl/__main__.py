"""`otl` and `python -m otl`."""

import signal

from otl.console import keep_going


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as a shell's `&` has it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while libraries are imported
    keep_going()
    from otl import cli  # only here: it takes half a second in which Ctrl-C may come

    cli.main()


if __name__ == "__main__":
    main()
