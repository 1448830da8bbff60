# Sourced by the other scripts: a virtual environment at .venv with requirements.txt in it, and DeepSpeed's CPU op compiled. Does nothing the second time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv
fi
source .venv/bin/activate
stamp=.venv/requirements.stamp
if ! cmp -s requirements.txt "$stamp"; then
  echo "[setup] installing requirements.txt into .venv (some minutes, once)" >&2
  python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  cp requirements.txt "$stamp"
fi
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=cpu
export TOKENIZERS_PARALLELISM=true HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" PYTHONUNBUFFERED=1
python -c 'from lr2train.training.engine import build_cpu_op; build_cpu_op()'
