"""Small tokenizers of the kinds that checkpoints have, made by the `tokenizers` library, and their folders."""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "In the beginning God created the heaven and the earth.",
    "And God said, Let there be light: and there was light.",
    "the light, the day; 1 and 12 and 123 days",
]

# Spaces where they are easily lost, digits, what only bytes can spell, and special tokens in the text.
TEXTS = [
    "In the light",
    " the light",
    "  two  spaces ",
    "days of 1234",
    "é日本🙂",
    "a\nb\n\n c",
    "the<|endoftext|> light </s>the",
    "<s>the<s> light",
    "the <pad>light",
    "▁the",
    "",
]

# As in Llama 3's tokenizer.json, shorter.
_WORDS = r"'s|'t|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _bos(token: str, id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, id)]
    )


def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as SentencePiece's: special tokens, 256 bytes, and pieces with ▁ for a space."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    found = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *found["vocab"]]
    return {name: id for id, name in enumerate(names)}, [tuple(pair) for pair in found["merges"]]


def llama2() -> Tokenizer:
    """Llama 2's: a normalizer that puts ▁ before the text and for each space; bytes for what has no piece; bos."""
    backend = Tokenizer(models.BPE(*_pieces(), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = _bos("<s>", 1)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def mistral() -> Tokenizer:
    """Mistral's later ones: Metaspace, which puts ▁ before the text alone."""
    backend = llama2()
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return backend


def metaspace() -> Tokenizer:
    """With Metaspace's own decoder, and no bytes."""
    backend = mistral()
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return backend


def byte_level(split: str | None = None) -> Tokenizer:
    """GPT-2's, or with another way to cut words Llama 3's without its bos."""
    parts = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        parts.insert(0, pre_tokenizers.Split(Regex(split), "isolated"))
    backend = Tokenizer(models.BPE(ignore_merges=split is not None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts) if split is not None else parts[0]
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def gpt2() -> Tokenizer:
    backend = byte_level()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def llama3() -> Tokenizer:
    backend = byte_level(_WORDS)
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    bos = _bos("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    return backend


KINDS = {"gpt2": gpt2, "llama2": llama2, "mistral": mistral, "metaspace": metaspace, "llama3": llama3}


def write(folder: Path, backend: Tokenizer | None, architecture: str | None, **beside: Any) -> Path:
    """`tokenizer.json`, a `config.json` of this `model_type`, and other documents; returns the folder."""
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
    if architecture is not None:
        beside = {"config": {"model_type": architecture}} | beside
    for name, document in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def write_pair(folder: Path, architecture: str = "gpt2", **beside: Any) -> Path:
    """GPT-2's own files, `vocab.json` and `merges.txt`; <|endoftext|> is in the vocabulary."""
    found = json.loads(byte_level().to_str())["model"]
    vocab = found["vocab"] | {"<|endoftext|>": len(found["vocab"])}
    merges = "\n".join(["#version: 0.2", *map(" ".join, found["merges"]), ""])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    return write(folder, None, architecture, vocab=vocab, **beside)
