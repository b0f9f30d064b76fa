#!/usr/bin/env bash
# Usage: bash train/setup.sh [package ...]
# Installs the packages that building Krait needs, and those named, as far as they are missing: prints them, then
# calls apt-get. Debian 12, Ubuntu 24.04 and newer. Does nothing, and needs no rights, when nothing is missing.
set -euo pipefail

packages=(
  build-essential cmake ninja-build ccache pkg-config
  libhdf5-dev libyaml-cpp-dev libopenblas-openmp-dev libcli11-dev libfmt-dev
  nlohmann-json3-dev libsentencepiece-dev
  libopenmpi-dev openmpi-bin
  catch2
  "$@"
)

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
  echo "setup: this is not a Debian or Ubuntu system; going on without installing. Krait needs what these" >&2
  echo "setup: Debian packages contain: ${packages[*]}" >&2
  exit 0
fi

# After Debian 12, sentencepiece.pc asks for protobuf's development files.
debian_12=$(. /etc/os-release && [ "${ID:-} ${VERSION_ID:-}" = "debian 12" ] && echo yes || true)
[ -n "$debian_12" ] || packages+=(libprotobuf-dev)

missing=()
for package in "${packages[@]}"; do
  state=$(dpkg-query -W -f '${db:Status-Status} ' "$package" 2>/dev/null || true)
  [[ " $state" == *" installed "* ]] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "setup: these packages are missing and this user is neither root nor has sudo. As root, run" >&2
    echo "  apt-get update && apt-get install -y --no-install-recommends ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "setup: installing ${missing[*]}"
# "${a[@]+...}": an empty array is an error under set -u in old versions of bash.
apt() { "${as_root[@]+"${as_root[@]}"}" env DEBIAN_FRONTEND=noninteractive apt-get -q "$@"; }
apt update || echo "setup: apt-get update failed; trying with the lists that are there" >&2
if ! apt install -y --no-install-recommends "${missing[@]}"; then
  echo "setup: apt-get could not install: ${missing[*]}" >&2
  echo "setup: Krait needs Debian 12, Ubuntu 24.04 (with the component universe) or newer" >&2
  exit 1
fi
