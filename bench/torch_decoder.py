"""GPT-2 in plain torch with a static cache and one CUDA graph a step: what can be had without a kernel of one's own.

A rival, so everything is in its favour: torch's fused attention, a cache no longer than asked, tokens chosen and
kept on the device, and no look at them before the last one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from model.gpt2_config import GPT2Config
from model.graph import capturing

#: Runs a function once, and gives what runs it again; the same memory each time.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class TorchDecoder:
    """Greedy tokens for a batch of prompts of one length."""

    def __init__(
        self, weights: Mapping[str, torch.Tensor], config: GPT2Config, *, rows: int, capacity: int, capture: Capture
    ):
        """weights: by the names of `model.gpt2.slots`; capture: `cuda_graph`, or `again` where there is none."""
        self._weights, self._config = weights, config
        table = weights["tokens.weight"]
        cache = (config.n_layer, rows, config.n_head, capacity, config.head_width)
        self._keys, self._values = (torch.zeros(cache, dtype=table.dtype, device=table.device) for _ in range(2))
        self._place = torch.arange(capacity, device=table.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=table.device)
        self._token = torch.zeros((rows, 1), dtype=torch.int64, device=table.device)
        self._tokens = torch.zeros((rows, capacity), dtype=torch.int64, device=table.device)
        with torch.no_grad():
            self._replay = capture(self._step)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
        """`new` tokens for every prompt."""
        ids = torch.tensor([list(each) for each in prompts], device=self._token.device)
        length = ids.shape[1]
        self._token.copy_(self._forward(ids, self._place[:length]))
        self._position.fill_(length)
        self._tokens[:, length : length + 1] = self._token
        for _ in range(new - 1):
            self._replay()
        return self._tokens[:, length : length + new].tolist()

    def _step(self) -> None:
        self._token.copy_(self._forward(self._token, self._position))
        self._position += 1
        self._tokens.index_copy_(1, self._position, self._token)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The next token (rows, 1) after ids (rows, T), which stand at `positions` (T,)."""
        weights, config = self._weights, self._config
        shape = (*ids.shape, config.n_head, config.head_width)
        # One token sees the whole cache up to its place, a prompt itself.
        mask = (self._place <= positions)[None, None, None] if ids.shape[1] == 1 else None
        x = F.embedding(ids, weights["tokens.weight"]) + F.embedding(positions, weights["positions.weight"])

        def norm(x: torch.Tensor, name: str) -> torch.Tensor:
            weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
            return F.layer_norm(x, (config.n_embd,), weight, bias, config.layer_norm_epsilon)

        def linear(x: torch.Tensor, name: str) -> torch.Tensor:
            return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

        for layer in range(config.n_layer):
            block = f"blocks.{layer}"
            parts = linear(norm(x, f"{block}.norm1"), f"{block}.qkv").split(config.n_embd, -1)
            q, k, v = (each.view(shape).transpose(1, 2) for each in parts)
            self._keys[layer].index_copy_(2, positions, k)
            self._values[layer].index_copy_(2, positions, v)
            if mask is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                y = F.scaled_dot_product_attention(q, self._keys[layer], self._values[layer], attn_mask=mask)
            x = x + linear(y.transpose(1, 2).reshape(x.shape), f"{block}.projection")
            x = x + linear(
                F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.up"), approximate="tanh"), f"{block}.down"
            )
        return F.linear(norm(x[:, -1:], "norm"), weights["tokens.weight"]).argmax(-1)


def again(function: Callable[[], None]) -> Callable[[], None]:
    """`Capture` where nothing is captured."""
    return function


def cuda_graph(function: Callable[[], None]) -> Callable[[], Any]:
    """`Capture` as torch documents it: warmed up on a stream of its own, then captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, pool=torch.cuda.graph_pool_handle(), stream=side):
        function()
    return graph.replay
