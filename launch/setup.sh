# Sourced by the other scripts: makes a virtual environment at .venv with the packages of requirements.txt; does nothing
# the second time. The working directory stays.
set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$checkout/.venv
if [ ! -f "$venv/ready" ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "[setup] Python 3.11 or newer is needed; set PYTHON to one" >&2; exit 2; }
  "${PYTHON:-python3}" -m venv --clear "$venv"  # an unfinished one is removed first
  touch "$venv/ready"
fi
source "$venv/bin/activate"
installed() { cmp -s "$checkout/$1.txt" "$venv/$1.stamp"; }
install() {  # the packages of one list, where the list is new
  installed "$1" && return
  echo "[setup] installing $1.txt into .venv (some minutes, once)" >&2
  python -m pip install --quiet --disable-pip-version-check -r "$checkout/$1.txt"
  [ "$1" != requirements ] || python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable "$checkout"  # the command `lr2train`
  cp "$checkout/$1.txt" "$venv/$1.stamp"
}
install requirements
if command -v nvidia-smi >/dev/null; then install requirements-gpu; else export DS_ACCELERATOR=cpu; fi
export TOKENIZERS_PARALLELISM=true PYTHONUNBUFFERED=1
