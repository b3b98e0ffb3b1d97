"""Few-shot prompts: an instruction, examples, and the question, in one text that fits."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpukernels.numbers import whole
from model.errors import ContextError, ModelError
from model.language_model import LanguageModel


@dataclass(frozen=True)
class Prompt:
    """A prompt as text, how many tokens it has, and the text that ends an answer to it."""

    text: str
    tokens: int
    stop: str


def few_shot(
    lm: LanguageModel,
    query: str,
    *,
    instruction: str = "",
    examples: Sequence[tuple[str, str]] = (),
    input_label: str = "Input:",
    output_label: str = "Output:",
    separator: str = "\n\n",
    max_new_tokens: int = 64,
) -> Prompt:
    """Builds the prompt

        INSTRUCTION<separator>Input: EXAMPLE
        Output: ANSWER<separator>Input: QUERY
        Output:

    for `lm.generate(prompt.text, stop=prompt.stop)`.

    Args:
        examples: pairs of an input and its answer (Brown et al., arXiv 2005.14165).
        separator: between examples; the model's next one ends its answer.
        max_new_tokens: the room that the answer needs.

    Raises:
        ContextError: it does not fit with the answer, naming its tokens and the limit.
        ModelError: an example that is not a pair, an empty separator, a model without tokenizer.
    """
    if lm.tokenizer is None:
        raise ModelError("few_shot needs a tokenizer, and this model has none")
    if not whole(max_new_tokens) or max_new_tokens < 1:
        raise ModelError(f"max_new_tokens must be 1 or more, got {max_new_tokens!r}")
    texts = {"instruction": instruction, "input_label": input_label, "output_label": output_label}
    for name, value in (texts | {"separator": separator, "the question": query}).items():
        if not isinstance(value, str):
            raise ModelError(f"{name} must be text, got {value!r}")
    if not isinstance(examples, list | tuple):
        raise ModelError(f"examples must be a list of pairs, got {examples!r}")
    if not separator:
        raise ModelError("separator must not be empty: it is what ends an answer")
    for number, example in enumerate(examples):
        pair = isinstance(example, list | tuple) and len(example) == 2
        if not pair or not all(isinstance(part, str) for part in example):
            raise ModelError(f"examples[{number}] must be a pair of an input and an output, got {example!r}")
    shots = [f"{input_label} {given}\n{output_label} {answer}" for given, answer in examples]
    text = separator.join([*([instruction] if instruction else []), *shots, f"{input_label} {query}\n{output_label}"])
    tokens = len(lm.tokenizer.encode(text))
    limit = lm.positions
    if tokens + max_new_tokens > limit:
        raise ContextError(
            f"the prompt has {tokens} tokens ({len(examples)} examples) and the answer may have {max_new_tokens}, "
            f"but the model has {limit} positions; give fewer or shorter examples"
        )
    return Prompt(text, tokens, separator)
