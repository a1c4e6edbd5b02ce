"""Checks of an installation and of a server, for `secateur doctor`."""

from secateur.checkup.check import Check
from secateur.checkup.examination import checkup

__all__ = ["Check", "checkup"]
