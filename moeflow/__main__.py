"""`python -m moeflow` is the command `moeflow`."""

from moeflow.cli import main

if __name__ == "__main__":
    main()
