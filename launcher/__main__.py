"""`python -m launcher` is the `launcher` command. Runs on the client; read `cli/main.py`."""

from launcher.cli.main import main

if __name__ == "__main__":
    main()
