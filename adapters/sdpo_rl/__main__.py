"""`python -m sdpo_rl`: the command line `sdpo`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
