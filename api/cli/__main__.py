"""`python -m api.cli`: the command line without its console script, for example under torchrun."""

from api.cli import main

if __name__ == "__main__":
    main()
