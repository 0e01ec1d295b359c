"""`python -m mopcompress`."""

from mopcompress.cli import main

if __name__ == "__main__":
    main()
