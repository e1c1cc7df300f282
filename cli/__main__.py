"""`python -m cli` is `streamforge`."""

from cli.app import main

if __name__ == "__main__":
    main()
