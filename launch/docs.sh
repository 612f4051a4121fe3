#!/usr/bin/env bash
# Builds docs/ as a site in site/, where a warning is an error; arguments go to mkdocs build. What it
# needs, the extra "docs" of setup.cfg, is installed into .venv-docs: it needs no torch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

needed=$(sed -n '/^docs =$/,/^$/s/^    //p' "$ROOT/setup.cfg")
VENV=$ROOT/.venv-docs
environment "$VENV"
if [ "$(cat "$VENV/.needed" 2>/dev/null)" != "$needed" ]; then
  echo "installing $(echo $needed) into $VENV (once) ..."
  # shellcheck disable=SC2086  # a list
  "$PYTHON" -m pip install --quiet $needed
  echo "$needed" >"$VENV/.needed"
fi
cd "$ROOT"
exec "$PYTHON" -m mkdocs build --strict --quiet "$@"
