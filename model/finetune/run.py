"""From a loaded model and a source of data to a trained one: everything is checked, then made, then run."""

import contextlib
import json
import zlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console

from model.adapter import products, write_adapter
from model.errors import DataError, TrainingError
from model.files import as_path
from model.finetune import checkpoint
from model.finetune.adapters import adapters, attach, first_values
from model.finetune.batches import Batches
from model.finetune.data import Document, read_documents, split_documents
from model.finetune.distributed import World, fill, joined, local
from model.finetune.flops import flops_per_token, peak_flops
from model.finetune.log import Log
from model.finetune.memory import REMEDY, training_needs
from model.finetune.modules import Network
from model.finetune.packing import Windows, pack
from model.finetune.settings import Settings
from model.finetune.trackers import Tracker, check_trackers
from model.finetune.train import Result, Trainer
from model.finetune.trainable import select, table
from model.graph import CudaCapture, is_capturable
from model.on_disk import OnDisk
from model.room import room_for
from model.save import save

if TYPE_CHECKING:
    from model.language_model import LanguageModel


def finetune(
    lm: "LanguageModel",
    dataset: Any,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    validation_data: Any = None,
    trackers: Sequence[str | Tracker] = (),
    console: Console | None = None,
    **options: Any,
) -> Result:
    """See `LanguageModel.finetune`."""
    settings = Settings.of(options)
    if validation_data is not None:  # a run that goes on must not differ in what is not used
        settings = replace(settings, validation=0.0)
    context = settings.window(lm.positions)
    if resume and out is None:
        raise TrainingError("resume needs the folder of the run that goes on (out)")
    if settings.keep_adapter and out is None:
        raise TrainingError("keep_adapter writes into the run's folder: give one (out)")
    check_trackers(trackers)
    parameters = lm.parameters
    if isinstance(parameters, OnDisk):
        if not settings.fsdp:
            raise TrainingError("the weights are on disk only, from where fsdp reads them; load the model")
        device = torch.device(parameters.place)
    else:
        array = next(iter(parameters.values()))
        device = array.device if isinstance(array, torch.Tensor) else torch.device("cpu")
        if isinstance(array, torch.Tensor) and array.is_inference():
            raise TrainingError(
                "the model was loaded under torch.inference_mode and cannot be trained: load it outside"
            )
    with joined(device) as world, contextlib.ExitStack() as stack:
        # Whatever the caller has set for code around this: `dtype` says what is computed in.
        for mode in (torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False)):
            stack.enter_context(mode)
        if settings.cuda_graph and (device.type != "cuda" or world.size > 1 or not is_capturable(lm.config)):
            raise TrainingError("cuda_graph needs a model on CUDA, one process, and heads up to 256 wide")
        if settings.fsdp and world.size == 1:
            raise TrainingError("fsdp shards over several processes: start them with torchrun")
        out = None if out is None else as_path("out", out, TrainingError)
        if out is not None and world.leads:
            checkpoint.check_out(out, resume=resume)
        world.wait()
        console = console or Console(stderr=True, highlight=False)
        if not world.leads:
            console = Console(quiet=True)

        chosen = _chosen(lm, settings)
        train, validation = (pack(part, context) for part in _documents(lm, dataset, validation_data, settings))
        started = _started(lm, train, validation, settings, world)
        if not world.agree(zlib.crc32(json.dumps(started, sort_keys=True).encode()), device):
            raise TrainingError(
                "the processes have different models, data or options: give each the same and all of it"
            )
        dtype = parameters.dtype if device.type == "cuda" else "float32"
        dtype = getattr(torch, dtype if settings.dtype == "auto" else settings.dtype)
        if not settings.fsdp:
            needs = _needs(lm, settings, chosen, dtype, tokens=min(settings.batch_size, len(train.tokens)) * context)
            stack.enter_context(room_for(parameters.device, needs, "training", REMEDY))
        network = _network(lm, settings, chosen, dtype, device, world)
        _check_finite(network, world if settings.fsdp else World())
        trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
        console.print(table(sizes, trained, tied="head.weight" not in parameters))

        def write() -> None:
            if settings.keep_adapter:
                base = None if lm._base is None else str(lm._base)
                lora = settings.lora
                options = {"alpha": lora.alpha, "rank_stabilized": lora.rank_stabilized, "base": base}
                made = adapters(network)
                if world.leads:
                    write_adapter(out, lm.config, made, **options)
            elif world.leads:
                _save(lm, out, network)
            else:  # rank 0 asks for every weight once, in this order
                for name in parameters.slots:
                    network.weight(name)

        trainer = Trainer(
            network,
            Batches(train, settings.batch_size, settings.accumulate, settings.seed, world),
            Batches(validation, settings.batch_size, 1, settings.seed, world),
            settings,
            world=world,
            started=started,
            out=out,
            write=None if out is None else write,
            capture=CudaCapture(device) if settings.cuda_graph else None,
        )
        found = checkpoint.newest(out) if resume and out is not None else None
        if found is not None:
            trainer.resume(found)
        peak = peak_flops(torch.cuda.get_device_name(device), str(dtype)[6:]) if device.type == "cuda" else None
        with Log(
            out if world.leads else None,
            total=trainer.steps,
            done=trainer.progress.step,
            evaluated=trainer.progress.evaluated == trainer.progress.step,
            flops_per_token=flops_per_token(lm.config, context),
            peak=None if peak is None else peak * world.size,
            trackers=trackers if world.leads else (),
            console=console,
        ) as log:
            result = trainer.run(log)
        if not isinstance(parameters, OnDisk):
            _put_back(lm, network)
    return result


def _documents(
    lm: "LanguageModel", dataset: Any, validation_data: Any, settings: Settings
) -> tuple[list[Document], list[Document]]:
    """Training and validation documents, each with a target at least; none to validate with where none are wanted."""

    def read(source: Any) -> list[Document]:
        return read_documents(
            source,
            lm.tokenizer,
            mask_prompt=settings.mask_prompt,
            separator=settings.separator,
            eos=next(iter(lm.eos_token_ids), None),
            vocabulary=lm.config.vocab_size,
        )

    wanted = validation_data is not None or settings.validation > 0
    if settings.patience is not None and not wanted:
        raise TrainingError("patience waits for a better validation loss, and there is no validation")
    if validation_data is None:
        train, validation = split_documents(read(dataset), settings.validation, settings.seed)
    else:
        train, validation = read(dataset), read(validation_data)
    for name, documents in (("training", train), ("validation", validation)):
        if (name == "training" or wanted) and not any(each.wanted[1:].any() for each in documents):
            raise DataError(f"{name}: no document has a token that follows another: there is nothing to predict")
    return train, validation


def _check_finite(network: torch.nn.Module, shards: World) -> None:
    """Weights of which no step could come: a run would call that divergence."""
    for name, parameter in network.named_parameters():
        wrong = int(shards.add((~local(parameter.detach()).isfinite()).sum()))
        if wrong:
            raise TrainingError(
                f"{name}: {wrong} of {parameter.numel()} numbers are infinite or NaN, and so would every loss be; "
                "gpukernels check --audit MODEL counts them by tensor"
            )


def _chosen(lm: "LanguageModel", settings: Settings) -> set[str] | list[str]:
    """The parameters that train, or the layers that have adapters."""
    if settings.lora is not None:
        return settings.lora.layers(products(lm.config))
    return select(list(lm.parameters), settings.freeze, settings.unfreeze, settings.layers)


def _needs(
    lm: "LanguageModel", settings: Settings, chosen: Collection[str], dtype: torch.dtype, *, tokens: int
) -> dict[str, int]:
    """What training takes beside the model, by what it is for."""
    parameters, name = lm.parameters, str(dtype).removeprefix("torch.")
    return training_needs(
        lm.config,
        settings,
        chosen,
        head="head.weight" in parameters,
        dtype=name,
        copied=name != parameters.dtype,
        tokens=tokens,
        on_gpu=parameters.device.name.startswith("cuda"),
    )


def _network(
    lm: "LanguageModel",
    settings: Settings,
    chosen: set[str] | list[str],
    dtype: torch.dtype,
    device: torch.device,
    world: World,
) -> Network:
    """The model as it trains: with `requires_grad` of what is chosen, with adapters, in shards."""
    arrays = lm.parameters
    if settings.fsdp:
        from model.finetune.sharding import outline, shard  # not every torch has it

        arrays = outline(lm.parameters.slots.values())
    network = Network(arrays, lm.config, dtype=dtype, recompute=settings.recompute, dropout=settings.dropout)
    if settings.lora is not None:
        attach(network, chosen, settings.lora)
    else:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in chosen)
    if settings.fsdp:
        shard(network, world, device)
        fill(network, lm.parameters.items(), world)
    fill(network, first_values(network, settings.seed), world)
    return network


def _started(
    lm: "LanguageModel", train: Windows, validation: Windows, settings: Settings, world: World
) -> dict[str, Any]:
    """What tells one run from another."""
    return {
        "settings": settings.decisive(),
        "model": lm.config.to_json() | {"weights": checkpoint.fingerprint(lm.parameters.values())},
        "data": {"windows": len(train.tokens), "contents": checkpoint.fingerprint([*train, *validation])},
        "processes": world.size,
    }


def _save(lm: "LanguageModel", out: Path, network: Network) -> None:
    save(
        out,
        lm.config,
        checkpoint.Weights(lm.parameters.slots, network),
        values=lm._values,
        tokenizer=lm.tokenizer,
        folder=lm._folder,
    )


def _put_back(lm: "LanguageModel", network: Network) -> None:
    """The trained values into the model's own memory, in its own dtype."""
    for name, array in lm.parameters.items():
        tensor = network.weight(name)
        if isinstance(array, np.ndarray):
            np.copyto(array, tensor.float().numpy(), casting="same_kind")
        else:
            lm.parameters.device.assign(array, tensor)
    lm._base = None
