#!/bin/sh
# Install what tests and the emulated device need from Debian or Ubuntu, or say what to install. Never fails a build:
# without these packages everything else works, and what needs them says so.
#   .ci/debian_packages.sh STAMP PACKAGE...      touches STAMP once nothing is missing
stamp=$1
shift
if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "note: no apt here, so the emulated arm64 device and its tests are left out (they need: $*)"
  touch "$stamp"
  exit 0
fi
missing=
for package in "$@"; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing="$missing $package"
done
if [ -n "$missing" ] && [ "$(id -u)" = 0 ]; then
  echo "installing$missing"
  log=$(mktemp)
  if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing; } >"$log" 2>&1; then
    missing=
  else
    tail -n 3 "$log"
  fi
  rm -f "$log"
fi
if [ -n "$missing" ]; then
  echo "note: missing$missing; the emulated arm64 device or the ssh test is left out."
  echo "      To have them: sudo apt-get install$missing"
else
  touch "$stamp"
fi
