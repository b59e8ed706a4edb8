"""Talk with the model of a finished run: prompts and conversations, shown to it as it was trained on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from ftdata.errors import InputRefused
from ftdata.pipeline.recipe import Recipe
from ftdata.tokenizing.tokenizer import Tokenizer
from ftdata.train.inference.generation import generate_ids
from ftdata.train.inference.progress import GenerationProgress, ProgressMeter
from ftdata.train.inference.prompts import encode_messages
from ftdata.train.inference.run_dir import FinishedRun, load_base_model, load_tuned_model
from ftdata.types import Message


@dataclass
class ChatSession:
    """A conversation with a model; `messages` is what was said so far.

    `forgets` says that the template has room for one question alone, so that nothing else is seen by the model.
    """

    model: Any
    recipe: Recipe
    options: dict[str, Any]
    messages: list[Message] = field(default_factory=list)
    forgets: bool = False
    progress: Callable[[GenerationProgress], None] | None = None

    def say(self, text: str) -> str:
        """Say something, and return the answer; both are remembered.

        Raises:
            InputRefused: the template cannot show the conversation.
        """
        said: Message = {"role": "user", "content": text}
        # What the model has said is not asked of it again, so it may be nothing.
        earlier = [cast(Message, {**one, "train": False}) for one in self.messages]
        try:
            (answer,) = self.answers([[*earlier, said]])
        except InputRefused as error:
            # One question is all that some templates have room for; too long is another matter.
            if not earlier or error.code != "template_raises" or any(one["role"] == "system" for one in earlier):
                raise
            (answer,) = self.answers([[said]])
            self.forgets = True
        self.messages = [*self.messages, said, {"role": "assistant", "content": answer}]
        return answer

    def answers(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Return what the model answers to each of several conversations."""
        prompts = [encode_messages(messages, self.recipe) for messages in conversations]
        tokenizer: Tokenizer = self.recipe.tokenizer
        # The blank before an answer may be a part of its first token.
        meter = ProgressMeter(len(prompts), 1, self.progress) if self.progress else None
        answers = generate_ids(self.model, prompts, progress=meter, **self.options)
        return [tokenizer.decode(ids).strip(" ") for ids in answers]


def start_session(
    run: FinishedRun,
    *,
    base: bool = False,
    system: str | None = None,
    progress: Callable[[GenerationProgress], None] | None = None,
    **options: Any,
) -> ChatSession:
    """Load a run's model, or its base model, for a conversation; see `ftdata.train.start_chat`."""
    if base or run.about["adapter"]:
        model = load_base_model(run, quantization=run.about["setup"]["quantization"], answers=True)
    if base:
        model.generation_config = base_generation_config(model, run)
    else:
        model = load_tuned_model(run, model if run.about["adapter"] else None)
    first: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return ChatSession(model, run.recipe, options, first, progress=progress)


def base_generation_config(model: Any, run: FinishedRun) -> Any:
    """Return a base model's generation config: it may stop as it always did, or as it was taught since."""
    settings = model.generation_config
    own = settings.eos_token_id
    known = set(own if isinstance(own, list) else [own]) - {None}
    settings.eos_token_id = sorted(run.stops | known)
    settings.pad_token_id = run.settings.pad_token_id
    return settings
