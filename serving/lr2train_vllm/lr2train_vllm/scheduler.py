"""vLLM's scheduler, and a request is computed anew when it outgrows the original window."""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from lr2train_vllm import windows
from lr2train_vllm.refusals import Refused


class TwoTablesScheduler(Scheduler):
    """Preempts a request in the step in which it outgrows L0, before its first token under the long table is computed.

    A request is *long* from then on: ``windows.is_long`` reads this from its prefix-cache salt.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        original = windows.switch_of(self.vllm_config)
        needed = ("running", "waiting", "kv_holding_waiting", "prev_step_scheduled_req_ids")
        missing = [name for name in needed if not hasattr(self, name)]
        if original is None or missing:
            raise Refused(f"vLLM's scheduler has no {missing or 'two RoPE tables'}; use vLLM 0.32")
        self._original = original

    def add_request(self, request: Request) -> None:
        """As the base; the request's prefix-cache salt gets the name of its table."""
        if request.request_id not in self.requests:  # else the next part of a streamed prompt: vLLM keeps the first
            _salt(request, windows.salted(request.cache_salt, self._outgrown(request)))
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """As the base, after requests that have outgrown L0 were put back to the front of the queue."""
        for request in reversed([one for one in self.running if self._has_to_switch(one)]):
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
            self.prev_step_scheduled_req_ids.discard(request.request_id)
        for request in [one for one in self.kv_holding_waiting if self._has_to_switch(one)]:
            self._let_go(request)
        return super().schedule(*args, **kwargs)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """As the base; vLLM itself may preempt a request, for want of memory, just when it has outgrown L0."""
        super()._preempt_request(request, *args, **kwargs)
        if self._has_to_switch(request):
            _salt(request, windows.lengthened(request.cache_salt))

    def _outgrown(self, request: Request) -> bool:
        return request.num_tokens > self._original

    def _has_to_switch(self, request: Request) -> bool:
        """Whether the cached keys and hashes of a request belong to the short table, and its tokens to the long one."""
        paused = request.status == RequestStatus.WAITING_FOR_STREAMING_REQ  # its last token may yet be dropped
        return self._outgrown(request) and not windows.is_long(request.cache_salt) and not paused

    def _let_go(self, request: Request) -> None:
        """Free the cache of a streamed prompt that outgrew L0 while it waited."""
        self.kv_holding_waiting.remove_request(request)
        self._free_request_blocks(request)
        request.num_computed_tokens = 0
        _salt(request, windows.lengthened(request.cache_salt))
        self.waiting.prepend_request(request)


def _salt(request: Request, salt: str) -> None:
    """Give a request another salt, and its blocks the hashes that follow from it."""
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()
