"""The version of this client."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("secateur")
except PackageNotFoundError:  # the files of a checkout, put on the path
    VERSION = "unknown"
