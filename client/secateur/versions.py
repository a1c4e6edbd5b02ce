"""The version of this client: a constant, for to read the metadata of a package takes 30 ms."""

VERSION = "0.1.0"
