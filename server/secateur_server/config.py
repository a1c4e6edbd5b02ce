"""The options of secateur-server. Each is also an environment variable."""

import argparse
import ipaddress
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import NoReturn

import torch

from secateur_server.backends.memory import total_memory
from secateur_server.option_types import switch
from secateur_server.options import Config, variable_of


class BadConfig(ValueError):
    """An option is unknown or wrong. The message is one line."""


class _Parser(argparse.ArgumentParser):
    """Raises BadConfig instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise BadConfig(message)


def read_config(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> Config:
    """Reads the options; prints a line on stderr and exits with 2 if one is wrong.

    Args:
        arguments: Of the command line.
        environment: Variables SECATEUR_*.
    """
    try:
        return parse_config(arguments, environment)
    except BadConfig as error:
        print(f"secateur-server: error: {error} (try secateur-server --help)", file=sys.stderr)
        sys.exit(2)


def parse_config(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """Reads each option from the command line, a SECATEUR_* variable, or its default.

    Args:
        arguments: Of the command line.
        environment: Variables SECATEUR_*.

    Raises:
        BadConfig: An option is unknown or wrong, or does not fit the others.
    """
    parser = _Parser(
        prog="secateur-server",
        description="Prunes neural networks over gRPC.",
        epilog="Each option is also an environment variable: --max-model-bytes is "
        "SECATEUR_MAX_MODEL_BYTES.",
    )
    parser.add_argument("--version", action="version", version=f"secateur {version('secateur')}")
    for option in fields(Config):
        kind, default, text = (option.metadata[part] for part in ("kind", "default", "text"))
        variable = variable_of(option.name)
        is_switch = kind is switch
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=kind,
            # argparse converts a string default as it does an argument, with the same errors.
            default=environment.get(variable, default),
            nargs="?" if is_switch else None,
            const=True if is_switch else None,
            metavar="1|0" if is_switch else None,
            help=f"{text} (default: {default})" if default and not is_switch else text,
        )
    options = vars(parser.parse_args(arguments))
    for name in ("max_model_bytes", "memory_limit"):
        if options[name] is None:
            # Checkpoints, files of URIs and small models are in host memory, others on the device.
            both = total_memory(options["device"]), total_memory(torch.device("cpu"))
            options[name] = min(both) * 3 // 4
    config = Config(**{**options, "metrics_address": options["metrics_address"] or None})
    if problem := _problem(config):
        raise BadConfig(problem)
    return config


def _problem(config: Config) -> str | None:
    """What is wrong with the combination of options."""
    if (config.tls_cert is None) != (config.tls_key is None):
        return "--tls-cert and --tls-key need each other: give both or neither"
    if config.tls_client_ca and not config.tls_cert:
        return "--tls-client-ca needs --tls-cert and --tls-key"
    if config.insecure:
        return None
    return _open_calls(config) or _open_metrics(config)


def _open_calls(config: Config) -> str | None:
    if not is_public(config.address):
        return None
    missing = [] if config.tls_cert else ["--tls-cert and --tls-key"]
    if not config.tokens_file and not config.tls_client_ca:
        missing.append("--tokens-file (or --tls-client-ca)")
    if not missing:
        return None
    return (
        f"--address {config.address} can be reached from other machines: give "
        f"{' and '.join(missing)}, or --insecure if something else protects the server"
    )


def _open_metrics(config: Config) -> str | None:
    address = config.metrics_address or ""
    if config.metrics_token_file or ":" not in address or not is_public(address):
        return None
    return (
        f"--metrics-address {address} can be reached from other machines: give "
        "--metrics-token-file, or --insecure if something else protects the server"
    )


def is_public(address: str) -> bool:
    """Whether other machines may reach an address.

    Args:
        address: Of gRPC or metrics.
    """
    if address.startswith(("unix:", "unix-abstract:")):
        return False
    host, colon, port = address.removeprefix("dns:///").rpartition(":")
    host = (host if colon and not port.endswith("]") else host + colon + port).strip("[]")
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may resolve to anything
        return True
