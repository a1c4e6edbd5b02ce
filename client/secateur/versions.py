"""The version of this client."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("secateur")
except PackageNotFoundError:  # a checkout on the path is not installed
    VERSION = "unknown"
