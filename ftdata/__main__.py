"""Run the command line with `python -m ftdata`."""

from ftdata.cli import main

if __name__ == "__main__":
    main()
