"""GPT-2 and LLaMA in plain torch with a static cache and one CUDA graph a step: what can be had without a kernel of
one's own.

A rival, so everything is in its favour: torch's fused attention, products of the same input in one, a cache no longer
than asked, tokens chosen and kept on the device, and no look at them before the last one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from model.forward import output_matrix
from model.gpt2_config import GPT2Config
from model.graph import capturing
from model.llama_config import LlamaConfig
from model.parameters import Parameters

#: Runs a function once, and gives what runs it again; the same memory each time.
Capture = Callable[[Callable[[], None]], Callable[[], None]]

#: Of a layer: queries (B, T, H, D), keys and values (B, T, Hkv, D) -> (B, T, H * D), of all that came before too.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class TorchDecoder:
    """Greedy tokens for a batch of prompts of one length."""

    def __init__(
        self, parameters: Parameters, config: GPT2Config | LlamaConfig, *, rows: int, capacity: int, capture: Capture
    ):
        """capture: `cuda_graph`, or `again` where there is none."""
        table = parameters["tokens.weight"]
        self._hidden = {GPT2Config: GPT2, LlamaConfig: Llama}[type(config)](parameters, config, capacity)
        self._head = parameters[output_matrix(parameters.root)]
        self._window = getattr(config, "sliding_window", None) or capacity
        cache = (config.n_layer, rows, config.kv_heads, capacity, config.head_width)
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
        # One token sees the cache up to its place, a prompt itself, and both no more than the window.
        one, new = ids.shape[1] == 1, ids.shape[1]
        places, mask = self._place if one else positions, None
        if one or new > self._window:
            behind = positions[:, None] - places
            mask = (behind >= 0) & (behind < self._window)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (each.transpose(1, 2) for each in (q, k, v))
            self._keys[layer].index_copy_(2, positions, k)
            self._values[layer].index_copy_(2, positions, v)
            if one:
                k, v = self._keys[layer], self._values[layer]
            shared = q.shape[1] != k.shape[1]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)
            return y.transpose(1, 2).reshape(*ids.shape, -1)

        return F.linear(self._hidden(ids, positions, attend)[:, -1:], self._head).argmax(-1)


class GPT2:
    """Tokens (B, T) to normed hidden states (B, T, C)."""

    def __init__(self, parameters: Parameters, config: GPT2Config, capacity: int):
        self._parameters, self._config = parameters, config

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        root, config = self._parameters.root, self._config
        shape = (*ids.shape, config.n_head, config.head_width)

        def norm(x: torch.Tensor, p: dict, name: str) -> torch.Tensor:
            return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], config.layer_norm_epsilon)

        def linear(x: torch.Tensor, p: dict, name: str) -> torch.Tensor:
            return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

        x = F.embedding(ids, root["tokens.weight"]) + F.embedding(positions, root["positions.weight"])
        for layer, p in enumerate(self._parameters.blocks):
            qkv = linear(norm(x, p, "norm1"), p, "qkv").split(config.n_embd, -1)
            x = x + linear(attend(layer, *(each.view(shape) for each in qkv)), p, "projection")
            x = x + linear(F.gelu(linear(norm(x, p, "norm2"), p, "up"), approximate="tanh"), p, "down")
        return norm(x, root, "norm")


class Llama:
    """As `GPT2`: of a LLaMA or a Mistral."""

    def __init__(self, parameters: Parameters, config: LlamaConfig, capacity: int):
        self._parameters, self._config = parameters, config
        table = parameters["tokens.weight"]
        frequencies = config.frequencies
        if frequencies is None:
            frequencies = config.rope.rope_theta ** -(torch.arange(0, config.head_width, 2) / config.head_width)
        angles = torch.arange(capacity)[:, None] * torch.as_tensor(frequencies).repeat(2)
        turns = (each * config.rope.scale for each in (angles.cos(), angles.sin()))
        self._cos, self._sin = (each.to(table.device, table.dtype) for each in turns)

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        root, config = self._parameters.root, self._config
        cos, sin = (each[positions][:, None] for each in (self._cos, self._sin))
        heads = [each * config.head_width for each in (config.n_head, config.kv_heads, config.kv_heads)]

        def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, x.shape[-1:], weight, config.rms_norm_eps)

        def linear(x: torch.Tensor, p: dict, name: str) -> torch.Tensor:
            return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

        def turned(x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        x = F.embedding(ids, root["tokens.weight"])
        for layer, p in enumerate(self._parameters.blocks):
            qkv = linear(norm(x, p["norm1.weight"]), p, "qkv").split(heads, -1)
            q, k, v = (each.view(*ids.shape, -1, config.head_width) for each in qkv)
            x = x + linear(attend(layer, turned(q), turned(k), v), p, "projection")
            gate, up = linear(norm(x, p["norm2.weight"]), p, "gate_up").chunk(2, -1)
            x = x + linear(F.silu(gate) * up, p, "down")
        return norm(x, root["norm.weight"])


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
