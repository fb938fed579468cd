"""`python -m ddengine` is the `ddengine` command."""

from ddengine.cli import main

if __name__ == "__main__":
    main(prog_name="ddengine")
