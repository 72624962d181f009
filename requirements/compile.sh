#!/bin/sh
# Compile the locks: every dependency with its hashes, one file a purpose. `sh requirements/compile.sh [--upgrade]`
set -eu
cd "$(dirname "$0")/.."
lock() { # output, further arguments of `uv pip compile`
    out=requirements/$1; shift
    uv pip compile --quiet --universal --generate-hashes --no-header --no-emit-index-url --python-version 3.11 -o "$out" "$@"
}
lock development.txt pyproject.toml --extra demo --group development --group bench "$@"
lock operations.txt -c requirements/development.txt --group operations
lock bench.txt -c requirements/development.txt pyproject.toml --extra demo --group build --group bench
lock demo.txt -c requirements/development.txt pyproject.toml --extra demo --group build
lock service.txt -c requirements/development.txt pyproject.toml
# In a virtual environment of their own: they pin what the service needs newer.
lock judges.txt --group judges "$@"
