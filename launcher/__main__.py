"""`python -m launcher` is the `launcher` command. Runs on the client; read `cli.py`."""

from launcher.cli import main

if __name__ == "__main__":
    main()
