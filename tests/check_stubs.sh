#!/usr/bin/env bash
# Fails where the stubs that are checked in are not what the .proto files make.
set -euo pipefail
cd "$(dirname "$0")/.."
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
protos/generate.sh "$made"
for stub in "$made"/*; do
    diff -u "protos/secateur_proto/$(basename "$stub")" "$stub" ||
        { echo "the stubs are stale: run make protos" >&2; exit 1; }
done
