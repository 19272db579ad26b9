#!/bin/sh
# find_python.sh [--oldest | VERSION]
# Print the newest supported Python of this machine, the oldest, or that of a version: on the PATH, or of pyenv.
case "${1:-}" in
  "") versions="3.13 3.12 3.11" ;;
  --oldest) versions="3.11 3.12 3.13" ;;
  *) versions="$1" ;;
esac
for version in $versions; do
  for python in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python3; do
    # A name on the PATH may be a shim without a Python behind it, and Debian's Python may lack ensurepip.
    "$python" -c "
import ensurepip, sys, venv
sys.exit('another version' if '%d.%d' % sys.version_info[:2] != '$version' else print(sys.executable))" 2>/dev/null && exit 0
  done
done
echo "There is no Python $versions with venv and ensurepip on this machine. Install one, or set PYTHON." >&2
exit 1
