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
if ! cmp -s "$checkout/requirements.txt" "$venv/requirements.stamp"; then
  echo "[setup] installing requirements.txt into .venv (some minutes, once)" >&2
  python -m pip install --quiet --disable-pip-version-check -r "$checkout/requirements.txt"
  python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable "$checkout"  # the command `lr2train`
  cp "$checkout/requirements.txt" "$venv/requirements.stamp"
fi
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=cpu
export TOKENIZERS_PARALLELISM=true PYTHONUNBUFFERED=1
