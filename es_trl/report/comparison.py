"""stub"""


def write_comparison():
    pass
