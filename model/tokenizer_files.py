"""A folder's files as a backend of `tokenizers`, which gives the ids that transformers' `AutoTokenizer` gives (5.23).

`tokenizer.json` means what it says, but for a tokenizer of the class GPT2Tokenizer or LlamaTokenizer: there only its
vocabulary, its merges, its special tokens and its post-processor count, and the rest is the class's. The class is the
one that `tokenizer_config.json` names, else `config.json`, else GPT2Tokenizer for a GPT-2. Without `tokenizer.json`,
`vocab.json` and `merges.txt` are GPT-2's byte-level BPE (Radford et al., 2019).

What puts bos before a text is the post-processor: `add_bos_token` and `add_eos_token` count beside `vocab.json` alone.
Tokens are added from `added_tokens_decoder` in `tokenizer_config.json`; without that from `added_tokens.json` and
`tokenizer.json`, and then `special_tokens_map.json` counts too. A special token that is only named comes behind them.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from model.errors import ModelError, TokenizerError
from model.files import AGAIN, disguise, read_json

_SETTINGS, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_DECODER = "added_tokens_decoder"  # a key of the first, where it is the last in other words
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

#: What a class calls its tokens where no file does.
_DEFAULTS = {
    "GPT2Tokenizer": dict.fromkeys(_NAMED[:3], "<|endoftext|>"),
    "LlamaTokenizer": dict(zip(_NAMED, ("<s>", "</s>", "<unk>"), strict=False)),
    None: {},
}


def read_backend(folder: Path) -> tuple[Backend, list[str]] | None:
    """The tokenizer of a folder, and what its user should know; None if it has no files that are read here.

    Raises TokenizerError for a damaged file.
    """
    whole, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    # What has a name is meant to be there: a dead link is damage, not a model without tokenizer.
    if not any(map(os.path.lexists, (whole, vocab, merges))):
        return None
    settings, notices = _if_there(folder / _SETTINGS), []
    if os.path.lexists(whole):
        backend, byte_level = _parsed(whole, lambda raw: (Backend.from_buffer(raw), b'"ByteLevel"' in raw))
        own = backend.get_added_tokens_decoder()
        name = _class_name(folder, settings, byte_level) if isinstance(backend.model, models.BPE) else None
        if name is not None:
            file, backend = backend, _of_class(name, backend.model, settings)
            backend.post_processor = file.post_processor
            if name == "GPT2Tokenizer" and not _cuts_as_gpt2(file):
                notices.append(f"{whole}: the text is cut up in GPT-2's way, and not in the file's, as {name} does")
        _add_tokens(backend, folder, _DEFAULTS[name], settings, own)
    else:
        name = "GPT2Tokenizer"
        backend = _of_class(name, _bpe(vocab, merges), settings)
        named = _add_tokens(backend, folder, _DEFAULTS[name], settings, None)
        backend.post_processor = _template(backend, named, settings)
    backend.encode_special_tokens = settings.get("split_special_tokens") is True
    # Both are for batches of training: a prompt is neither cut nor filled up.
    backend.no_padding()
    backend.no_truncation()
    return backend, notices


def _class_name(folder: Path, settings: dict[str, Any], byte_level: bool) -> str | None:
    """The class of transformers that takes some of `tokenizer.json` alone; None where it counts as it stands."""
    try:
        config = _if_there(folder / "config.json")
    except ModelError:
        config = {}  # what is wrong with it is told where it is read for itself
    kind = config.get("model_type")
    default = "GPT2Tokenizer" if kind == "gpt2" else ""
    name = str(settings.get("tokenizer_class") or config.get("tokenizer_class") or default).removesuffix("Fast")
    if kind == "mistral" or name not in _DEFAULTS or (name == "LlamaTokenizer" and byte_level):
        return None
    return name


def _of_class(name: str, model: models.BPE, settings: dict[str, Any]) -> Backend:
    """A backend of a class's own parts around a vocabulary with its merges."""
    llama = name == "LlamaTokenizer"
    model.dropout = model.unk_token = model.continuing_subword_prefix = model.end_of_word_suffix = None
    model.fuse_unk = model.byte_fallback = llama
    model.ignore_merges = False
    backend = Backend(model)
    prefix = settings.get("add_prefix_space")
    if not llama:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix is True)
        backend.decoder = decoders.ByteLevel()
        return backend
    prefix = prefix is None or bool(prefix)
    scheme = "never" if not prefix else "always" if settings.get("legacy") else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return backend


def _cuts_as_gpt2(backend: Backend) -> bool:
    """Whether the class changes nothing but the space before a text."""
    return backend.normalizer is None and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)


def _bpe(vocab: Path, merges: Path) -> models.BPE:
    ids = read_json(vocab, TokenizerError)
    if not all(type(each) is int and each >= 0 for each in ids.values()):
        raise TokenizerError(f"{vocab}: must map every token to its id")
    return _parsed(merges, lambda raw: models.BPE(ids, _pairs(merges, raw)))


def _add_tokens(
    backend: Backend,
    folder: Path,
    defaults: dict[str, str],
    settings: dict[str, Any],
    own: dict[int, AddedToken] | None,
) -> dict[str, AddedToken]:
    """Adds what is no piece of the vocabulary; the special tokens by what they are called ("bos_token").

    `own` are those of `tokenizer.json`. Without it the ids in the files must be those that come of it.
    """
    complete = _DECODER in settings
    names = {} if complete else _if_there(folder / _SPECIAL)
    named = _named(defaults | settings | names)
    special = [*named.values(), *_extra(settings, names)]
    path = folder / (_SETTINGS if complete else _ADDED)
    added = _decoder(path, settings[_DECODER]) if complete else _added(path, special) | (own or {})
    tokens = [token for _, token in sorted(added.items())]
    by_name = {token.content for token in named.values()}
    for token in tokens:
        token.special |= token.content in by_name
    known = {token.content for token in (*tokens, *backend.get_added_tokens_decoder().values())}
    for token in special:
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    backend.add_tokens(tokens)
    for wanted, token in added.items() if own is None else ():
        if backend.token_to_id(token.content) != wanted:
            what = f"gives {token.content!r} the id {wanted}, which does not follow the vocabulary"
            raise TokenizerError(f"{path}: {what}")
    return named


def _named(values: dict[str, Any]) -> dict[str, AddedToken]:
    """The tokens that are no text and have a name, in the order in which they are added."""
    more = [name for name in values if name.endswith("_token") and name not in _NAMED]
    found = {name: values.get(name) for name in (*_NAMED, *more)}
    if isinstance(extra := values.get("extra_special_tokens"), dict):
        found |= extra
    return {name: token for name, value in found.items() if (token := _token(value)) is not None}


def _extra(settings: dict[str, Any], names: dict[str, Any]) -> list[AddedToken]:
    """The special tokens that have no name; "additional" is what they were once called."""

    def listed(values: dict[str, Any], key: str) -> list:
        return value if isinstance(value := values.get(f"{key}_special_tokens"), list) else []

    found = (listed(settings, "extra") or listed(settings, "additional")) + listed(names, "extra")
    found = found or listed(names, "additional")
    return [token for value in found if (token := _token(value)) is not None]


def _token(value: Any, special: bool = True) -> AddedToken | None:
    """A token as TEXT or {"content": TEXT, ...}; None for what is neither, as `add_bos_token`: true."""
    value = {"content": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return None
    flags = {name: value[name] is True for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
    return AddedToken(value["content"], special=special, **flags)


def _decoder(path: Path, values: Any) -> dict[int, AddedToken]:
    """Tokens by id, from {"ID": {"content": TEXT, ...}}."""
    found = {}
    for id, value in values.items() if isinstance(values, dict) else [(None, values)]:
        token = _token(value, value.get("special") is True) if isinstance(value, dict) else None
        if token is None or not str(id).isdecimal() or len(id) > 18:
            wanted = f'must map "ID" to {{"content": TOKEN}}, got {value!r} for {id!r}'
            raise TokenizerError(f"{path}: {_DECODER} {wanted}")
        found[int(id)] = token
    return found


def _added(path: Path, special: Iterable[AddedToken]) -> dict[int, AddedToken]:
    """Tokens by id, from {TEXT: ID}."""
    found, special = {}, {token.content for token in special}
    for text, id in _if_there(path).items():
        if type(id) is not int:
            raise TokenizerError(f"{path}: must map every token to its id, got {id!r} for {text!r}")
        found[id] = AddedToken(text, special=text in special)
    return found


def _template(
    backend: Backend, named: dict[str, AddedToken], settings: dict[str, Any]
) -> processors.TemplateProcessing | None:
    """What puts bos before a text and eos behind it, where `tokenizer_config.json` asks for it."""
    bos, eos = (
        [token.content] if settings.get(f"add_{name}") and (token := named.get(name)) is not None else []
        for name in ("bos_token", "eos_token")
    )
    if not bos and not eos:
        return None
    special = {token: backend.token_to_id(token) for token in (*bos, *eos)}
    return processors.TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=list(special.items()))


def _parsed(path: Path, parse: Callable[[bytes], Any]) -> Any:
    """What `parse` makes of a file; TokenizerError, naming it, for whatever goes wrong."""
    try:
        raw = path.read_bytes()
    except OSError as fault:
        raise TokenizerError(f"{path}: cannot be read: {fault.strerror}") from None
    try:
        return parse(raw)
    except (TokenizerError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as fault:  # the library raises bare Exception, and where it panics, less than that
        first = (str(fault) or type(fault).__name__).splitlines()[0]
        what = disguise(raw) or f"not a tokenizer that can be read: {first}; {AGAIN}"
        raise TokenizerError(f"{path}: {what}") from None


def _if_there(path: Path) -> dict[str, Any]:
    """What a small file says, if it is there."""
    if not os.path.lexists(path):
        return {}
    values = read_json(path, TokenizerError)
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # JSON can escape what no token can hold
        raise TokenizerError(f"{path}: has half of a surrogate pair in it, which is no text; {AGAIN}") from None
    return values


def _pairs(path: Path, raw: bytes) -> list[tuple[str, str]]:
    pairs = []
    for number, line in enumerate(raw.decode("utf-8").splitlines(), 1):
        if line and not line.startswith("#version"):
            pair = tuple(line.split(" "))
            if len(pair) != 2:
                raise TokenizerError(f"{path}: line {number} must be two symbols with a space between, got {line!r}")
            pairs.append(pair)
    return pairs
