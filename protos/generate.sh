#!/usr/bin/env bash
# Makes the stubs in protos/secateur_proto from protos/secateur/v1, in an environment of its own:
# the generator must be at the floor of the dependency ranges. `generate.sh DIR` writes to DIR.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-protos/secateur_proto}
tools=.venv-protos
if ! cmp -s protos/requirements.txt "$tools/requirements.txt"; then
    "${PYTHON:-python3}" -m venv --clear "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check -r protos/requirements.txt
    cp protos/requirements.txt "$tools/requirements.txt"
fi
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
PATH="$PWD/$tools/bin:$PATH" "$tools/bin/python" -W ignore -m grpc_tools.protoc -Iprotos \
    --python_out="$made" --grpc_python_out="$made" \
    --mypy_out=quiet:"$made" --mypy_grpc_out=quiet:"$made" \
    protos/secateur/v1/*.proto
# The package `secateur` is the client's, so the stubs live in `secateur_proto`.
sed -i -E 's/^from secateur\.v1 import/from secateur_proto import/;
    s/secateur\.v1\.([a-z]+)_pb2/secateur_proto.\1_pb2/g' "$made"/secateur/v1/*.py*
mkdir -p "$target"
cp "$made"/secateur/v1/*_pb2.py* "$made"/secateur/v1/{pruner,checkpoints}_pb2_grpc.py* "$target"
