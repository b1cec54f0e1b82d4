"""fastdpo's version, and those of what is installed beside it."""

__version__ = "0.1.0"


PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "triton")


def installed_versions() -> dict[str, str]:
    """The versions of what takes part in training, as far as it is installed."""
    from importlib.metadata import PackageNotFoundError, version  # not needed to import fastdpo

    versions = {"fastdpo": __version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
