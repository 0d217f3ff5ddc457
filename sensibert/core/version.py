"""The installed version. pyproject.toml is its only source."""


def version() -> str:
    from importlib import metadata  # slow to import, and rarely needed

    try:
        return metadata.version("sensibert")
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"
