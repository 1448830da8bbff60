"""A name that every worker has to import: a worker without the plugin, on another machine, would have one table."""


class NeedsPlugin:
    """vLLM's worker extension; it adds nothing."""
