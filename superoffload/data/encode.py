"""Text -> input_ids and labels."""

from dataclasses import dataclass
from typing import Any

from superoffload.data.formats import Example

IGNORED = -100  # the label of a position that does not count in the loss


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as the model sees it: `input_ids` and `labels`, int lists of one length.

    `labels[i]` is `input_ids[i]` where the token counts and -100 elsewhere; the model shifts them itself.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def target_tokens(self) -> int:
        """Count the labels that will be predicted: the first position has nothing before it."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(text: Example, tokenizer: Any, max_length: int, train_on_prompt: bool) -> Encoded:
    """Tokenise prompt and answer, end the answer with the end-of-sequence token, and cut to `max_length`.

    Both are tokenised apart, so that the answer follows the very tokens that the prompt alone has when the
    model is used. What counts goes by length and never by token id: a tokenizer whose padding token is its
    end-of-sequence token still learns to stop.
    """
    prompt = tokenizer(text.prompt)["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    answer = [*tokenizer(text.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    labels = [*(prompt if train_on_prompt else [IGNORED] * len(prompt)), *answer]
    return Encoded(input_ids=[*prompt, *answer][:max_length], labels=labels[:max_length])
