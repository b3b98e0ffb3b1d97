"""Models of the Hugging Face Hub: the cache first, safetensors only, and one sentence for every failure.

The client is `huggingface_hub`, imported when a model is fetched, so that its cache and its environment
variables (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT) mean here what they mean elsewhere.
A snapshot that is whole is used without a request. Otherwise one request names the commit and its files, and
what a model needs of them is downloaded from that commit. The branch is written to the cache when all of it
is there, so a download that breaks off never stands for the model.
"""

import contextlib
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from model.checkpoint import INDEX_NAME, MAX_HEADER, WEIGHTS_NAME, read_weight_map
from model.errors import CheckpointError, HubError, RepositoryError
from model.files import CONVERT, as_path

_CONFIG, _TOKENIZER, _VOCABULARY = "config.json", "tokenizer.json", ("vocab.json", "merges.txt")
_OPTIONAL = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"(?!/|.*\.\.)[^\x00- ~^:?*\[\\\x7f]+")  # as git has it: no path out of refs/

_HEADER = 100_000  # bytes of a safetensors file that are asked for at first; most headers are shorter

_TIMEOUT = 10.0  # seconds without an answer to the list of files; the client's default is to wait for ever


def fetch(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    refresh: bool = False,
    progress: bool = True,
    outline: Path | None = None,
) -> Path:
    """The folder in the Hub's cache with config, weights and tokenizer of `name`, downloaded if they are not there.

    Args:
        name: a model repository: `gpt2`, `openai-community/gpt2-xl`.
        revision: branch, tag or commit; None for "main".
        cache_dir: None for the client's (HF_HUB_CACHE, else HF_HOME).
        local_files_only: make no request, as with HF_HUB_OFFLINE.
        token: an access token; True for the stored one, False for none, None for the stored one if there is one.
        refresh: ask the Hub which commit the revision is now, although it is cached.
        progress: show the client's progress bars.
        outline: an empty folder, for a look at a model that is not cached: instead of its weights come their
            headers, with nothing behind them (holes of the right size), beside copies of the other files.

    Returns:
        The snapshot's folder (or `outline`), with the tokenizer files that the repository has. (Offline, they may be
        missing from a snapshot that another program began.)

    Raises:
        HubError: the model cannot be had; RepositoryError where that is what the repository holds.

    Cost: no request for a cached snapshot; else one for the list of files, and the client's for each file. A Hub
    that is down shows at once: the client repeats a failed request for a file (for up to 23 s), not for the list.
    """
    try:
        from huggingface_hub import constants, hf_hub_download, is_offline_mode
    except ImportError as fault:
        raise HubError(f"{name}: {fault.name} is missing or too old: pip install -U huggingface_hub") from None
    revision = "main" if revision is None else revision
    where = name if revision == "main" else f"{name} at {revision}"
    if not isinstance(revision, str):
        raise HubError(f"revision must be text, or None, got {revision!r}")
    if not _REVISION.fullmatch(revision):
        raise HubError(f"{name}: {revision!r} cannot be a branch, tag or commit")
    cache = as_path("cache_dir", constants.HF_HUB_CACHE if cache_dir is None else cache_dir, HubError).resolve()
    offline = "local_files_only" if local_files_only else "HF_HUB_OFFLINE" if is_offline_mode() else None

    if not refresh:
        with _one_sentence(where, cache):
            folder, missing = _cached(name, revision, cache)
        if not missing or (offline and missing == [_TOKENIZER]):
            return folder
    if offline:
        need = "refresh was asked for" if refresh else f"the cache {cache} lacks {', '.join(missing)}"
        raise HubError(
            f"{where}: {need}, and {offline} forbids asking the Hub: check the name, or load it once without"
        )
    with _one_sentence(where, cache):
        commit, files = _listing(name, revision, token)

    bar = None if progress else _quiet_bar()

    def get(file: str) -> Path:
        with _one_sentence(where, cache, file):
            if outline is not None and file.endswith(".safetensors"):
                return _outline(name, file, commit, token, outline)
            path = Path(hf_hub_download(name, file, revision=commit, cache_dir=cache, token=token, tqdm_class=bar))
            return path if outline is None else Path(shutil.copyfile(path, outline / file))

    # Weights come last: by them, or by a shard of them, a download that broke off is known.
    folder = get(_CONFIG).parent
    # SentencePiece is not read, but where there is nothing else, loading says what to do about it.
    tokenizer = {_TOKENIZER, *_VOCABULARY} if files & {_TOKENIZER, *_VOCABULARY} else {"tokenizer.model"}
    for file in sorted(files & {*_OPTIONAL, *tokenizer}):
        get(file)
    if WEIGHTS_NAME in files:
        get(WEIGHTS_NAME)
    else:
        shards = _shards(name, get(INDEX_NAME))
        if lost := [file for file in shards if file not in files]:
            raise RepositoryError(f"{where}: {INDEX_NAME} names {lost[0]}, which the repository does not have")
        for file in shards:
            get(file)
    if outline is None:
        _note(folder, revision, {_TOKENIZER, *_VOCABULARY} - files)
    return folder


def _outline(name: str, file: str, commit: str, token: str | bool | None, folder: Path) -> Path:
    """A safetensors file of the commit, of which only the header has been asked for: what it claims is not judged."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url, headers = hf_hub_url(name, file, revision=commit), build_hf_headers(token=token)

    def get(start: int, stop: int) -> tuple[bytes, int]:
        """These bytes, of those that there are, and how many there are."""
        wanted = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        answer = get_session().get(url, headers=wanted, timeout=_TIMEOUT)
        if answer.status_code == 416:  # an empty file has no bytes to ask for
            return b"", 0
        hf_raise_for_status(answer)
        size = answer.headers.get("Content-Range", "").rpartition("/")[2]
        return answer.content, int(size) if size.isdecimal() else len(answer.content)

    found, size = get(0, _HEADER)
    end = 8 + int.from_bytes(found[:8], "little")
    if len(found) < end <= min(size, 8 + MAX_HEADER):
        found += get(len(found), end)[0]
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as written:
        written.write(found[:end])
        written.truncate(size)
    return path


def _cached(name: str, revision: str, cache: Path) -> tuple[Path, list[str]]:
    """The revision's folder in the cache, and which files it must have and lacks."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    def find(file: str, revision: str) -> object:
        return try_to_load_from_cache(name, file, cache_dir=cache, revision=revision)

    found = [path for file in (_CONFIG, WEIGHTS_NAME, INDEX_NAME) if isinstance(path := find(file, revision), str)]
    if not found:
        return cache, [_CONFIG, WEIGHTS_NAME]
    folder = Path(found[0]).parent

    def present(file: str) -> bool:
        return (folder / file).is_file()

    def absent(file: str) -> bool:  # from the repository: the client marks what it asked for in vain
        return find(file, folder.name) is _CACHED_NO_EXIST

    needed = [_CONFIG]
    if present(WEIGHTS_NAME) or not present(INDEX_NAME):
        needed.append(WEIGHTS_NAME)
    else:
        needed += _shards(name, folder / INDEX_NAME)
    tokenizer = present(_TOKENIZER) or all(map(present, _VOCABULARY))
    if not tokenizer and not (absent(_TOKENIZER) and any(map(absent, _VOCABULARY))):
        needed.append(_TOKENIZER)
    return folder, [file for file in needed if not present(file)]


def _listing(name: str, revision: str, token: str | bool | None) -> tuple[str, set[str]]:
    """The commit that the revision is now, and the names of its files."""
    from huggingface_hub import HfApi

    info = HfApi(token=token).model_info(name, revision=revision, timeout=_TIMEOUT)
    files = {file.rfilename for file in info.siblings or ()}
    if not _COMMIT.fullmatch(info.sha or ""):
        raise HubError(f"{name}: the Hub's answer names no commit: check HF_ENDPOINT")
    if _CONFIG not in files:
        raise RepositoryError(f"{name}: the repository has no {_CONFIG}: it holds no model in Hugging Face layout")
    if not files & {WEIGHTS_NAME, INDEX_NAME}:
        if pickles := sorted(file for file in files if file.endswith(_PICKLES)):
            raise RepositoryError(f"{name}: only pickled weights ({pickles[0]}), which can run code; {CONVERT}")
        raise RepositoryError(f"{name}: the repository has no weights to read: wanted {WEIGHTS_NAME} or {INDEX_NAME}")
    return info.sha, files


def _shards(name: str, index: Path) -> list[str]:
    """The files that an index names, which are its neighbours."""
    try:
        return sorted(set(read_weight_map(index).values()))
    except CheckpointError as fault:
        raise RepositoryError([f"{name}: {problem}" for problem in fault.problems]) from None


def _quiet_bar() -> type:
    """The client's progress bar, switched off: the client's own switch is for the whole process."""
    from huggingface_hub.utils import tqdm

    class Quiet(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "disable": True})

    return Quiet


def _note(folder: Path, revision: str, absent: Iterable[str]) -> None:
    """Write into the cache what its next reader looks for: files the commit does not have, then the revision.

    The layout is documented (huggingface_hub, "Manage your cache"). The client writes the same, but only after
    asking the Hub for the branch once more, which may have moved since its files were listed.
    """
    repository, commit = folder.parent.parent, folder.name
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next load its requests
        for file in absent:
            mark = repository / ".no_exist" / commit / file
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        if revision != commit:
            reference = repository / "refs" / revision
            reference.parent.mkdir(parents=True, exist_ok=True)
            new = reference.with_name(f"{reference.name}.{secrets.token_hex(4)}.tmp")
            new.write_text(commit)
            new.replace(reference)


@contextlib.contextmanager
def _one_sentence(where: str, cache: Path, file: str | None = None) -> Iterator[None]:
    """Turn what the client raises into a HubError that says what was wrong and what to do."""
    outer = sys.exc_info()[1]  # what the caller is handling is no part of a failure in here
    try:
        yield
    except HubError:
        raise
    except Exception as fault:
        chain: list[BaseException] = [fault]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) not in (None, outer, *chain):
            chain.append(cause)
        what = where if file is None else f"{where}: {file}"
        if sentence := _explain(chain, where, cache):
            raise HubError(f"{what}: {sentence}") from None
        # Not foreseen: the client's message stays in the traceback, since it may quote a header with the token.
        raise HubError(f"{what}: the client failed with {type(fault).__name__}: try again") from fault


def _explain(chain: list[BaseException], where: str, cache: Path) -> str | None:
    """What a failure of the client means. By the names of classes, as those of its HTTP library change."""
    from huggingface_hub import constants

    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    # A 403 or 5xx for a file is wrapped in an error of the local cache: the status is in its cause.
    answers = (getattr(link, "response", None) for link in chain)
    status = next((answer.status_code for answer in answers if answer is not None), 0)
    disk = next((link.strerror for link in chain if isinstance(link, OSError) and link.errno), None)
    hub = re.sub(r"//[^/]*@", "//", constants.ENDPOINT)  # a mirror's address may have a password
    page = f"{hub}/{where.partition(' ')[0]}"
    login = "hf auth login, HF_TOKEN or token="
    no_hub = {"FileMetadataError", "JSONDecodeError", "UnsupportedProtocol", "InvalidURL", "TooManyRedirects"}
    cases = (
        ("HFValidationError" in kinds, "neither a file nor a Hub model, whose name is NAME or OWNER/NAME"),
        ("LocalTokenNotFoundError" in kinds, "token=True, but no token is stored: hf auth login, or HF_TOKEN"),
        (kinds & {"LocalProtocolError", "UnicodeEncodeError"}, "the token has a character that none has: a line end?"),
        ("GatedRepoError" in kinds, f"access is gated: accept the licence at {page}, then give a token ({login})"),
        ("RevisionNotFoundError" in kinds, f"the Hub has no such branch, tag or commit: see {page}"),
        ("RemoteEntryNotFoundError" in kinds, "the Hub lists the file but does not have it (404): try again"),
        (
            "RepositoryNotFoundError" in kinds,
            f"no such model, or a private one: check the name, or the token ({login})",
        ),
        (status == 401, f"the Hub refuses the token (401): give one that is valid ({login})"),
        (status == 403, f"the Hub forbids it (403): the model is disabled, or the token may not read it ({login})"),
        (status == 429, "too many requests for the Hub (429): wait some minutes, or give a token"),
        (status >= 500, f"the Hub is in trouble ({status}): try again later"),
        (status, f"the Hub answered {status}: try again, or check HF_ENDPOINT ({hub})"),
        (kinds & {"ConnectError", "TimeoutException", "ProxyError"}, f"{hub} cannot be reached: check the network"),
        (kinds & no_hub, f"there is no Hub at {hub}: check HF_ENDPOINT"),
        ("TransportError" in kinds, "the connection broke off: try again"),
        (disk, f"the cache {cache} cannot be used: {disk}: make room, or set HF_HOME to another folder"),
        ("OSError" in kinds, "the download is not whole: try again"),
    )
    return next((sentence for true, sentence in cases if true), None)
