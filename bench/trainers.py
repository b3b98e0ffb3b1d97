"""The trainers that `bench.train` compares, each behind the same call: some steps, their losses, how long they took."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

import model
from model.finetune.packing import order
from model.memory import peak_memory

#: What both do: AdamW, decay of matrices, clipping by the global norm, a constant rate.
RATE, DECAY, BETAS, CLIP = 1e-4, 0.1, (0.9, 0.95), 1.0


class Steps(NamedTuple):
    """Some optimizer steps."""

    losses: list[float]  # nats a token, of each
    seconds: float  # of all but the first
    memory: int  # bytes at most so far: allocated on the GPU, or of the process


class Clock:
    """Is told of every step of `lm.finetune` when it is done."""

    def __init__(self):
        self.losses: list[float] = []
        self.times: list[float] = []

    def log(self, record: dict[str, Any]) -> None:
        self.times.append(time.perf_counter())
        self.losses.append(record["loss"])

    def close(self) -> None:
        pass


class Ours:
    """`lm.finetune`: the kernels on CUDA, plain torch on the CPU. graph: each pass as one CUDA graph."""

    def __init__(self, folder: Path, device: str, dtype: str, graph: bool = False):
        self._lm = model.load(folder, device=device, dtype=dtype)
        self._cuda, self._graph = device == "cuda", graph

    def train(self, rows: np.ndarray, batch: int, steps: int) -> Steps:
        """`steps` updates on rows (N, T) of token ids, `batch` of them at a time, in the order of seed 0."""
        clock = Clock()
        self._lm.finetune(
            rows, batch_size=batch, context=rows.shape[1], epochs=1, max_steps=steps, validation=0.0, seed=0,
            learning_rate=RATE, schedule="constant", warmup=0, weight_decay=DECAY, betas=BETAS, clip=CLIP,
            cuda_graph=self._graph, trackers=[clock], console=Console(quiet=True),
        )  # fmt: skip
        return Steps(clock.losses, clock.times[-1] - clock.times[0], _memory(self._cuda))


class Transformers:
    """transformers' GPT-2 and torch's fused AdamW; below float32 by autocast, with weights in float32."""

    def __init__(self, folder: Path, device: str, dtype: str, compiled: bool = False):
        import torch
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._torch, self._device, self._dtype = torch, device, getattr(torch, dtype)
        off = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False}
        self.lm = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, **off).to(device).train()
        matrices = [each for each in self.lm.parameters() if each.ndim >= 2]
        others = [each for each in self.lm.parameters() if each.ndim < 2]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
        self._forward = torch.compile(self.lm) if compiled else self.lm

    def train(self, rows: np.ndarray, batch: int, steps: int) -> Steps:
        torch, losses, times = self._torch, [], []
        numbers = order(len(rows), 0, 0)
        for step in range(steps):
            ids = torch.from_numpy(rows[numbers[step * batch : (step + 1) * batch]]).to(self._device).long()
            with torch.autocast(self._device, self._dtype, enabled=self._dtype != torch.float32):
                loss = self._forward(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.lm.parameters(), CLIP)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())  # ours reads it in every step too, for its log
            times.append(time.perf_counter())
        return Steps(losses, times[-1] - times[0], _memory(self._device == "cuda"))


def _memory(cuda: bool) -> int:
    if not cuda:
        return peak_memory()
    import torch

    return torch.cuda.max_memory_allocated()
