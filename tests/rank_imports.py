"""What the server of ``ranks.py`` imports once, so that no rank has to: torch, transformers' families, DeepSpeed and what its ZeRO pulls in.

DeepSpeed looks for a device when it is imported; ranks are CPU processes, and a server that has touched a GPU must not be forked.
"""

import gc
import importlib
import os

os.environ["DS_ACCELERATOR"] = "cpu"

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2")

for module in (
    "torch.distributed",
    "transformers.modeling_utils",
    *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES),
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imported with the first optimizer, and with it torch's compiler: seconds
    "hypothesis",
    "pytest",
):
    importlib.import_module(module)

gc.collect()
gc.freeze()  # DeepSpeed collects garbage with every engine: it need not look at all these modules again
