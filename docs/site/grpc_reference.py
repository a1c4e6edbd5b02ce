"""Makes a Markdown page of each .proto file from its comments."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

Comments = dict[tuple[int, ...], str]  # by the path of what they are about, as in SourceCodeInfo
PACKAGE = ".secateur.v1."
# Numbers of the fields of descriptors, of which those paths consist.
MESSAGES, ENUMS, SERVICES = 4, 5, 6
FIELDS = VALUES = METHODS = 2


def pages(protos: Path) -> dict[str, str]:
    """Returns the pages by their paths, `grpc/NAME.md`."""
    command = [str(Path(sys.executable).with_name("buf")), "build", str(protos), "-o", "-"]
    built = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    files = FileDescriptorSet.FromString(built.stdout).file
    own = [file for file in files if f".{file.package}." == PACKAGE]
    homes = {
        f"{PACKAGE}{name}": Path(file.name).stem
        for file in own
        for name in [kind.name for kind in file.message_type] + [e.name for e in file.enum_type]
    }
    return {f"grpc/{Path(file.name).stem}.md": "\n".join(page(file, homes)) for file in own}


def page(file: FileDescriptorProto, homes: dict[str, str]) -> Iterator[str]:
    """Yields the blocks of a file's page: services, messages, enums."""
    comments = {
        tuple(found.path): found.leading_comments for found in file.source_code_info.location
    }
    yield f"# {Path(file.name).name}\n"
    yield f"Package `{file.package}`, generated from `protos/{file.name}`.\n"
    for number, service in enumerate(file.service):
        yield from service_blocks(service, (SERVICES, number), comments, homes)
    for number, message in enumerate(file.message_type):
        yield from message_blocks(message, (MESSAGES, number), comments, homes)
    for number, enum in enumerate(file.enum_type):
        yield from enum_blocks(enum, (ENUMS, number), comments)


def service_blocks(
    service: ServiceDescriptorProto,
    path: tuple[int, ...],
    comments: Comments,
    homes: dict[str, str],
) -> Iterator[str]:
    """Yields the blocks of a service: its comment, and each RPC."""
    yield f"## service {service.name}\n"
    yield prose(comments[path])
    for number, method in enumerate(service.method):
        yield f"### rpc {method.name}\n"
        yield f"{signature(method, homes)}\n"
        yield prose(comments[(*path, METHODS, number)])


def signature(method: MethodDescriptorProto, homes: dict[str, str]) -> str:
    """Says what an RPC takes and returns, with links."""
    takes = "a stream of " * method.client_streaming + link(method.input_type, homes)
    gives = "a stream of " * method.server_streaming + link(method.output_type, homes)
    return f"Takes {takes}, returns {gives}."


def message_blocks(
    message: DescriptorProto, path: tuple[int, ...], comments: Comments, homes: dict[str, str]
) -> Iterator[str]:
    """Yields the blocks of a message: its comment, and a table of its fields."""
    yield f"## {message.name}\n"
    yield prose(comments[path])
    if not message.field:
        return
    yield "| field | no. | type | meaning |\n|---|---|---|---|"
    for number, field in enumerate(message.field):
        text = cell(comments[(*path, FIELDS, number)])
        if field.HasField("oneof_index") and not field.proto3_optional:
            text = f"One of `{message.oneof_decl[field.oneof_index].name}`. {text}"
        kind = type_of(field, message, homes)
        yield f"| `{field.name}` | {field.number} | {kind} | {text} |"
    yield ""


def type_of(field: FieldDescriptorProto, message: DescriptorProto, homes: dict[str, str]) -> str:
    """Returns the type of a field as a .proto file writes it, with links."""
    for entry in message.nested_type:
        if field.type_name.endswith(f".{message.name}.{entry.name}"):
            key, value = (type_of(part, entry, homes) for part in entry.field)
            return f"map of {key} to {value}"
    repeated = "repeated&nbsp;" * (field.label == field.LABEL_REPEATED)
    optional = "optional&nbsp;" * field.proto3_optional
    if field.type_name:
        return repeated + optional + link(field.type_name, homes)
    return repeated + optional + field.Type.Name(field.type).removeprefix("TYPE_").lower()


def enum_blocks(
    enum: EnumDescriptorProto, path: tuple[int, ...], comments: Comments
) -> Iterator[str]:
    """Yields the blocks of an enum: its comment, and a table of its values."""
    yield f"## {enum.name}\n"
    yield prose(comments[path])
    yield "| value | no. | meaning |\n|---|---|---|"
    for number, value in enumerate(enum.value):
        yield f"| `{value.name}` | {value.number} | {cell(comments[(*path, VALUES, number)])} |"
    yield ""


def link(type_name: str, homes: dict[str, str]) -> str:
    """Returns the name of a message or an enum, as a link if this package has it."""
    name = type_name.removeprefix(PACKAGE).removeprefix(".")
    home = homes.get(type_name)
    return f"[{name}]({home}.md#{name.lower()})" if home else name


def prose(comment: str) -> str:
    """Returns a comment as Markdown. Lines with two more spaces begin the items of a list."""
    text = re.sub(r"^ ", "", escaped(comment), flags=re.MULTILINE)
    text = re.sub(r"^  (?=\S)", "- ", text, flags=re.MULTILINE)
    return re.sub(r"^(?!- )(.*\S.*)\n(?=- )", r"\1\n\n", text, flags=re.MULTILINE)


def cell(comment: str) -> str:
    """Returns a comment as one line of Markdown."""
    return " ".join(escaped(comment).split())


def escaped(comment: str) -> str:
    """Escapes what Markdown would interpret, except code in backticks."""
    code = re.split(r"(`[^`]*`)", comment)
    return "".join(
        part if part[:1] == "`" else re.sub(r"[*<|\[]", r"\\\g<0>", part) for part in code
    )
