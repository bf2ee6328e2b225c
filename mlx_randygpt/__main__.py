"""The program `mlxgpt`, which is also `python -m mlx_randygpt`."""

import signal


def main() -> None:
    """Run the command line; until a command runs, Ctrl-C ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # before a tenth of a second of imports
    from mlx_randygpt import cli

    cli.main()


if __name__ == "__main__":
    main()
