"""Lines of JSON as the parts of documents.

Three forms of a record: `text`; `prompt` and `completion`; `messages`, each with a `role` (system, user or
assistant) and `content`. Prompt and completion are encoded apart and joined, as in generation. Messages are
rendered as

    System: CONTENT
    User: CONTENT
    Assistant: CONTENT<eos>
    User: ...

so that "User: How are you?\\nAssistant:" is the prompt to ask the trained model with. Other keys are not read.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from model.errors import DataError
from model.files import json_fault

_ROLES = {"system": "System:", "user": "User:", "assistant": "Assistant:"}
_MOST = 8  # faults that are listed one by one


class Part(NamedTuple):
    """A piece of a document's text that is encoded by itself."""

    text: str
    wanted: bool  # its tokens count as targets
    ends: bool  # the eos token follows


def parse_lines(name: str, text: str, mask_prompt: bool) -> list[tuple[str, list[Part]]]:
    """For each line of a file that is not blank: what to call it in a message, and its parts.

    Raises DataError with the lines at fault, up to eight of them.
    """
    found, faults = [], []
    # Not `splitlines`: a JSON string may hold other line ends than \n as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append((f"{name}: line {number}", _parts(line, mask_prompt)))
        except DataError as fault:
            faults.append(f"{name}: line {number}: {fault}")
    raise_faults(faults, name)
    return found


def _parts(line: str, mask_prompt: bool) -> list[Part]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as fault:
        raise DataError(f"not valid JSON: {fault.msg.removesuffix(' at')} at column {fault.colno}") from None
    except (ValueError, RecursionError) as fault:
        raise DataError(f"not valid JSON: {json_fault(fault)}") from None
    if not isinstance(record, dict):
        raise DataError(f"must be a JSON object, got {type(record).__name__}")
    is_text, is_conversation = "text" in record, "messages" in record
    if is_text + is_conversation + ("prompt" in record or "completion" in record) != 1:
        keys = ", ".join(sorted(record)) or "nothing"
        raise DataError(f'must have "text", or "prompt" and "completion", or "messages"; it has {keys}')
    if is_text:
        if mask_prompt:
            raise DataError('has "text" alone, and no prompt to mask')
        return [Part(_string(record, "text"), True, True)]
    if is_conversation:
        return _conversation(record["messages"], mask_prompt)
    prompt, completion = _string(record, "prompt"), _string(record, "completion")
    if not completion:
        raise DataError('"completion" is empty')
    return [Part(prompt, not mask_prompt, False), Part(completion, True, True)]


def _string(record: dict, key: str, where: str = "") -> str:
    if key not in record:
        raise DataError(f'{where}"{key}" is missing')
    if not isinstance(record[key], str):
        raise DataError(f'{where}"{key}" must be a string, got {type(record[key]).__name__}')
    return record[key]


def _conversation(messages: Any, mask_prompt: bool) -> list[Part]:
    """The parts of a conversation: what leads to an answer is one, and the answer, with its eos, the next."""
    if not isinstance(messages, list) or not messages:
        raise DataError('"messages" must be a list with a message at least')
    parts, lead = [], ""
    for number, message in enumerate(messages):
        where = f"message {number}: "
        if not isinstance(message, dict):
            raise DataError(f"{where}must be an object, got {type(message).__name__}")
        role, content = _string(message, "role", where), _string(message, "content", where)
        if role not in _ROLES:
            raise DataError(f'{where}"role" must be one of {", ".join(_ROLES)}, got {role!r}')
        lead += "\n" * (number > 0) + _ROLES[role]
        if role != "assistant":
            lead += f" {content}"
        elif not content:
            raise DataError(f'{where}"content" of the assistant is empty')
        else:
            parts += [Part(lead, not mask_prompt, False), Part(f" {content}", True, True)]
            lead = ""
    if mask_prompt and not parts:
        raise DataError('"messages" have none of the assistant, which alone would count')
    return [*parts, Part(lead, not mask_prompt, True)] if lead else parts


def raise_faults(faults: Sequence[str], name: str) -> None:
    """DataError for faults, if there are any: the first eight, and how many more."""
    if len(faults) > _MOST:
        faults = [*faults[:_MOST], f"{name}: {len(faults) - _MOST} more are at fault"]
    if faults:
        raise DataError(faults)
