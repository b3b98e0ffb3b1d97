"""What a run of training takes, from the model's shape and the settings: refused where it will not fit."""

from collections.abc import Collection

from model.architecture import architecture
from model.config import Config
from model.device import WIDTHS
from model.finetune.settings import Settings
from model.parameters import padded_rows, padded_sizes

#: What to do where there is too little.
REMEDY = "reduce batch_size or context, use recompute, or train fewer parameters (lora_rank, layers)"

_LOGITS = 2**30  # bytes at most that a chunk of the loss has on a GPU, a quarter of all: see gpukernels/kernels


def training_needs(
    config: Config,
    settings: Settings,
    chosen: Collection[str],
    *,
    head: bool,
    dtype: str,
    copied: bool,
    tokens: int,
    on_gpu: bool,
) -> dict[str, int]:
    """Bytes beside the loaded model, by what they are for: at least so many on the CPU, where plain torch keeps more.

    Args:
        chosen: the parameters that train, or with adapters the layers that have them.
        head: whether the model has an output matrix of its own.
        dtype: of weights and activations while training; copied: the loaded model has another.
        tokens: of a forward pass of this process.
    """
    slots = {slot.name: slot for slot in architecture(config).slots(config, head=head)}
    width, exact = WIDTHS[dtype], 0 if dtype == "float32" else 4
    if settings.lora is None:
        trained, formed = sum(padded_sizes(slots[name] for name in chosen)), 0
    else:
        adapted = [slots[f"{name}.weight"] for name in chosen]
        trained = sum(settings.lora.rank * sum(slot.shape) for slot in adapted)
        formed = sum(slot.size for slot in adapted)  # W + s b a, kept until its gradient is made
    moments = 4 * trained
    if settings.optimizer == "muon":
        moments -= 4 * sum(slots[name].size for name in chosen if slots[name].layered and len(slots[name].shape) == 2)
    kept, layers = architecture(config).kept(config), config.n_layer
    numbers = config.n_embd * layers + kept if settings.recompute else kept * layers
    activations = width * (tokens * numbers + (formed // layers if settings.recompute else formed))
    padded = padded_rows(config.vocab_size)
    # A chunk of logits, and the gradient of the output matrix in float32.
    loss = on_gpu * (min(_LOGITS, tokens * padded * width // 4) + 4 * padded * config.n_embd)
    return {
        "copies of weights": width * (trained + copied * sum(slot.size for slot in slots.values())),
        "gradients": trained * (width + (exact if settings.accumulate > 1 else 0)),
        "moments and exact weights": 4 * trained + moments + exact * trained,
        # As these go, gradients come, which are copied together when they are whole.
        "activations": max(activations + loss, width * trained),
    }
