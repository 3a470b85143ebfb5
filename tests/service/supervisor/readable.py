"""A program for the warm reader: says what it was given, complains, and ends with 78."""

import sys


def main(arguments: list[str]) -> int:
    sys.stdout.write(str(arguments))
    sys.stderr.write("complaint")
    return 78
