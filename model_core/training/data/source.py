"""temporary"""


def as_source(given, config, fmt, split):
    return given
