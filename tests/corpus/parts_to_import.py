"""Something for the cases to import."""

paths = ["std"]


def joined() -> str:
    return "".join(paths)
