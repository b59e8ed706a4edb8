"""Chat sessions with the model of a finished run. Conversations are rendered in the same way as in training."""

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
    """A chat session with a loaded model: it stores the messages and generates the answers.

    Attributes:
        model: the model, with its generation config.
        recipe: the recipe of the build, which renders and tokenizes conversations.
        options: further arguments of `model.generate`.
        messages: the messages so far.
        is_single_turn: whether the template renders only a single question, so the model does not see earlier messages.
        progress: called with the progress after each token.
    """

    model: Any
    recipe: Recipe
    options: dict[str, Any]
    messages: list[Message] = field(default_factory=list)
    is_single_turn: bool = False
    progress: Callable[[GenerationProgress], None] | None = None

    def say(self, text: str) -> str:
        """Send a user message to the model, and return the model's answer. Append both messages to `messages`.

        Raises:
            InputRefused: the template cannot render the conversation.
        """
        question: Message = {"role": "user", "content": text}
        # Earlier answers are not trained, so they may be empty.
        earlier = [cast(Message, {**message, "train": False}) for message in self.messages]
        try:
            (answer,) = self.generate_answers([[*earlier, question]])
        except InputRefused as error:
            # Some templates render only a single question. A prompt that is too long raises another error code.
            has_system = any(message["role"] == "system" for message in earlier)
            if not earlier or error.code != "template_raises" or has_system:
                raise
            (answer,) = self.generate_answers([[question]])
            self.is_single_turn = True
        self.messages = [*self.messages, question, {"role": "assistant", "content": answer}]
        return answer

    def generate_answers(self, conversations: Sequence[Sequence[Message]]) -> list[str]:
        """Generate and return the model's answer to each conversation."""
        prompts = [encode_messages(messages, self.recipe) for messages in conversations]
        tokenizer: Tokenizer = self.recipe.tokenizer
        meter = ProgressMeter(len(prompts), 1, self.progress) if self.progress else None
        answers = generate_ids(self.model, prompts, progress=meter, **self.options)
        # The first token of an answer may contain the space before the answer.
        return [tokenizer.decode(ids).strip(" ") for ids in answers]


def start_session(
    run: FinishedRun,
    *,
    base: bool = False,
    system: str | None = None,
    progress: Callable[[GenerationProgress], None] | None = None,
    **options: Any,
) -> ChatSession:
    """Load the tuned model or the base model of a run, and return a chat session with the model.

    See `ftdata.train.start_chat`.
    """
    run.check_generates()
    if base or run.metadata["adapter"]:
        model = load_base_model(run, quantization=run.metadata["setup"]["quantization"], answers=True)
    if base:
        model.generation_config = base_generation_config(model, run)
    else:
        model = load_tuned_model(run, model if run.metadata["adapter"] else None)
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    return ChatSession(model, run.recipe, options, messages, progress=progress)


def base_generation_config(model: Any, run: FinishedRun) -> Any:
    """Add the tuned model's stop tokens and pad token to the generation config of a base model. Return the config."""
    settings = model.generation_config
    base_stops = settings.eos_token_id
    base_stop_ids = set(base_stops if isinstance(base_stops, list) else [base_stops]) - {None}
    settings.eos_token_id = sorted(run.stop_ids | base_stop_ids)
    settings.pad_token_id = run.generation_config.pad_token_id
    return settings
