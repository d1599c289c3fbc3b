"""The `launcher` command and `python -m launcher`. Runs on the client; read `cli/main.py`."""

import sys


def main() -> None:
    """Run a command in a fork of the Ray that `launcher up` started, if there is one, else in this process."""
    try:
        if sys.platform == "linux":
            from launcher.processes import warm_ray

            warm_ray.run_command(sys.argv)
        from launcher.cli.main import main as run

        run()
    except KeyboardInterrupt:  # during imports: nothing has started yet
        sys.exit(130)


if __name__ == "__main__":
    main()
