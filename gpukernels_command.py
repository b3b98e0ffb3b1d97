"""Where the `gpukernels` command begins: with next to no import, so that Ctrl-C is met while the rest is imported."""

import os


def main() -> None:
    """Runs the command and exits."""
    try:
        import signal

        # NumPy makes an ImportError of a KeyboardInterrupt: until all is there, Ctrl-C ends the process at once.
        meant = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where it is ignored, under nohup
        if meant:
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        from model.cli.app import main

        if meant:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
    except KeyboardInterrupt:
        os._exit(130)
