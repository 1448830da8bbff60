"""The DeepSpeed engine, its checkpoints and its config keys: the only folder that imports deepspeed."""
