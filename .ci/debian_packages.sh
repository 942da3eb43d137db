#!/bin/sh
# Install what tests and the emulated device need from Debian or Ubuntu, or say what to install. Never fails a build:
# without these packages everything else works, and what needs them says so. Each is installed by itself, so that one that
# a release does not have (Ubuntu has chromium only as a snap) costs none of the others. Another browser of its kind does
# for chromium: tests take whichever runs.
#   .ci/debian_packages.sh STAMP PACKAGE...      touches STAMP once nothing is missing
stamp=$1
shift
if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
  echo "note: no apt here, so the emulated arm64 device and the tests of these packages are left out: $*"
  touch "$stamp"
  exit 0
fi
# Ubuntu's package has a command too, which only says to install the snap: so it must run.
has_browser() {
  for browser in chromium chromium-browser google-chrome; do
    if "$browser" --version >/dev/null 2>&1; then return 0; fi
  done
  return 1
}
missing=
for package in "$@"; do
  if [ "$package" = chromium ] && has_browser; then continue; fi
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing="$missing $package"
done
if [ -n "$missing" ] && [ "$(id -u)" = 0 ]; then
  echo "installing$missing"
  log=$(mktemp)
  apt-get update >"$log" 2>&1 || tail -n 3 "$log"
  wanted=$missing
  missing=
  for package in $wanted; do
    if ! DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$package" >"$log" 2>&1; then
      tail -n 3 "$log"
      missing="$missing $package"
    fi
  done
  rm -f "$log"
fi
if [ -n "$missing" ]; then
  echo "note: missing$missing; the emulated arm64 device, the ssh test or the test of a report's page is left out."
  echo "      To have them: sudo apt-get install$missing"
else
  touch "$stamp"
fi
