"""Keeps chosen rows of the steps that are logged, with what both models said of their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import SDPOConfig
from ..rollout.demonstrations import Rollout, TeacherContext
from ..step.micro_batch import Observation
from . import files
from .selection import Candidate, choose
from .tokens import LogitSettings, likeliest_tokens, token_text, token_texts

# Tokens of a completion, likeliest tokens of a position, and characters of a text that are written.
MOST_TOKENS, LIKELIEST, MOST_CHARACTERS = 2048, 5, 20_000

Decode = Callable[[list[int]], str]


def make_recorder(
    config: SDPOConfig, args: Any, processing_class: Any, settings: LogitSettings, *, writes: bool
) -> Recorder | None:
    """The recorder of a run; `None` with `credit_rows=0` and on processes that write nothing.

    Args:
        config: its `credit_rows` and `success_reward_threshold` are used.
        args: the run's `GRPOConfig`.
        processing_class: the tokenizer, or a processor with one.
        settings: what turns outputs into distributions.
        writes: whether this process writes the run's files.

    Raises:
        ValueError: the run is not logged by steps.
    """
    if not config.enabled or not config.credit_rows:
        return None
    if args.logging_strategy != "steps":
        raise ValueError(
            f"credit_rows: expected 0 with logging_strategy={args.logging_strategy.value!r}, got "
            f"{config.credit_rows}; rows are kept in the steps that are logged, which must be known before: set "
            "logging_strategy='steps'"
        )
    if not writes:
        return None
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Recorder(Path(args.output_dir) / files.CREDIT, config, decode, settings)


class Recorder:
    """Chooses rows in the micro-batches of one optimizer step, and writes them once the step is logged.

    Only this process's rows are seen; nothing is communicated.

    Args:
        path: of the file.
        config: of the run.
        decode: text of tokens, special ones included.
        settings: what turns outputs into distributions.
    """

    def __init__(self, path: Path, config: SDPOConfig, decode: Decode, settings: LogitSettings) -> None:
        self._path, self._config, self._decode, self._settings = path, config, decode, settings
        self._texts: list[dict[str, Any]] = []  # of this process's rows of the generation batch
        self._kept: list[Candidate] = []
        self._seen = 0  # rows of the step
        self._step: int | None = None  # that the kept rows are of
        self._writes = True

    def state(self) -> list[dict[str, Any]]:
        """The texts of the generation batch, in JSON's types."""
        return self._texts

    def load_state(self, state: Sequence[dict[str, Any]]) -> None:
        """Continue from `state()`."""
        self._texts = list(state)

    # --- the generation batch ----------------------------------------------------------------------------

    def begin_batch(self, rollout: Rollout, context: TeacherContext, *, first_row: int) -> None:
        """Remember the texts of a generation batch, whose micro-batches have its rows' places as `rollout_row`.

        Args:
            rollout: the generation batch.
            context: its reprompts.
            first_row: global row of this process's first.
        """
        scores = rollout.scores[first_row:][: len(rollout.prompts)]
        successes = (scores >= self._config.success_reward_threshold).tolist()
        prompts = context.prompts
        self._texts = [
            {
                "row": first_row + i,
                "score": scores[i].item(),
                "success": successes[i],
                "feedback": _bounded(rollout.feedback[i]),
                "feedback_used": prompts.uses_feedback[i],
                "demonstrations": [
                    {"row": row, "text": _bounded(text)}
                    for row, text in zip(
                        context.demonstration_rows[i], context.demonstrations[i], strict=True
                    )
                ],
                "demonstration_used": prompts.has_demonstration[i],
                "truncated": prompts.truncated[i],
                "dropped": prompts.dropped[i],
            }
            for i in range(len(rollout.prompts))
        ]

    # --- the micro-batches of a step ---------------------------------------------------------------------

    def observer(
        self, args: Any, state: Any, inputs: Mapping[str, Any]
    ) -> Callable[[Observation], None] | None:
        """What the loss of a micro-batch is to call; `None` in a step that is not logged.

        Args:
            args: the run's `GRPOConfig`.
            state: the Trainer's, before the step.
            inputs: of the micro-batch; its rows without a signal are seen here, since no model runs on them.
        """
        step = state.global_step + 1
        is_logged = step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        # A batch from the checkpoint of a run without `credit_rows` has no texts, even if its rows have places.
        if not is_logged or not self._texts or "rollout_row" not in inputs:
            return None
        if step != self._step:
            self._step, self._kept, self._seen = step, [], 0
        self._see_without_signal(inputs)
        return self._see

    def _see_without_signal(self, inputs: Mapping[str, Any]) -> None:
        """The rows without a signal."""
        has_tokens, has_loss = (inputs[name].any(-1) for name in ("completion_mask", "loss_mask"))
        # Read at once: each read waits for the device.
        columns = torch.stack([(has_tokens & ~has_loss).long(), inputs["rollout_row"].flatten()]).T.tolist()
        places = [(position, self._texts[row]) for position, (is_one, row) in enumerate(columns) if is_one]
        first = self._seen
        new = [Candidate(first + i, None, text["success"], {}) for i, (_, text) in enumerate(places)]
        self._seen += len(new)
        for row in self._choose(new):
            position, text = places[row.order - first]
            ids = inputs["completion_ids"][position][inputs["completion_mask"][position].bool()]
            row.content.update(
                text,
                prompt=self._text(inputs["prompt_ids"][position], inputs["prompt_mask"][position]),
                teacher_prompt=None,
                divergence=None,
                **self._completion(ids.tolist()),
            )

    def _see(self, seen: Observation) -> None:
        """The rows with a signal."""
        mask = seen.batch.completions["loss_mask"]
        sums = seen.tokens.divergence.float().masked_fill(~mask, 0.0).sum(-1)
        rollout_rows = seen.batch.completions["rollout_row"].flatten()
        table = torch.stack([rollout_rows.float(), mask.sum(-1).float(), sums]).T.tolist()
        new: list[Candidate] = []
        places: list[tuple[int, dict[str, Any]]] = []
        for position, (rollout_row, count, total) in enumerate(table):
            if count:
                text = self._texts[int(rollout_row)]
                new.append(Candidate(self._seen, total / count, text["success"], {}))
                places.append((position, text))
                self._seen += 1
        for row in self._choose(new):
            position, text = places[row.order - new[0].order]
            row.content.update(text, divergence=_round(row.divergence), **self._content(seen, position))

    def _choose(self, new: Sequence[Candidate]) -> list[Candidate]:
        """Those of the new rows that are kept, for now."""
        self._kept = choose([*self._kept, *new], self._config.credit_rows)
        return [row for row in self._kept if not row.content]

    def _content(self, seen: Observation, position: int) -> dict[str, Any]:
        """A row's prompts, and its tokens with what both models say of them."""
        student, teacher = seen.batch.student, seen.batch.teacher
        assert teacher is not None  # the row has a teacher
        size = student.sizes[position][1]
        length = min(size, MOST_TOKENS)
        ids = student.ids[position, -student.completion_length :][:size].tolist()
        flags = seen.batch.completions["loss_mask"][position, :length].tolist()

        def values(tensor: Tensor) -> list[float | None]:
            return [
                _round(x) if on else None for x, on in zip(tensor[position].tolist(), flags, strict=False)
            ]

        def likeliest(outputs: Sequence[Any]) -> list[Any]:
            found = likeliest_tokens(outputs, position, length, self._settings, k=LIKELIEST)
            return [
                [[i, round(p, 5)] for i, p in top] if on else None
                for top, on in zip(found, flags, strict=True)
            ]

        student_top, teacher_top = likeliest([seen.student]), likeliest(seen.teachers)
        shown = {i for top in [*student_top, *teacher_top] for i, _ in top or []}
        tokens = seen.tokens
        teacher_position = position
        if seen.batch.teacher_rows is not None:
            teacher_position = seen.batch.teacher_rows.tolist().index(position)
        return {
            "prompt": self._prompt(student, position),
            "teacher_prompt": self._prompt(teacher, teacher_position),
            **self._completion(ids),
            "log_prob": values(tokens.log_probs),
            "log_ratio": values(tokens.teacher_log_probs - tokens.log_probs),
            "token_divergence": values(tokens.divergence),
            "student_top": student_top,
            "teacher_top": teacher_top,
            "texts": {str(i): token_text(i, self._decode) for i in sorted(shown)},
        }

    def _completion(self, ids: list[int]) -> dict[str, Any]:
        shown = ids[:MOST_TOKENS]
        return {
            "ids": shown,
            "tokens": token_texts(shown, self._decode),
            "tokens_left_out": len(ids) - len(shown),
        }

    def _prompt(self, batch: Any, position: int) -> str | None:
        columns = slice(0, -batch.completion_length)
        return self._text(batch.ids[position, columns], batch.mask[position, columns])

    def _text(self, ids: Tensor, mask: Tensor) -> str | None:
        return _bounded(self._decode(ids[mask.bool()].tolist()))

    # --- the log -----------------------------------------------------------------------------------------

    def write(self, step: int) -> list[dict[str, Any]]:
        """Write the rows of the step that was logged; returns them."""
        if step != self._step:
            return []
        rows = [{"step": step, **row.content} for row in self._kept]
        self._step, self._kept = None, []
        if self._writes:
            try:
                files.append_bounded(self._path, rows)
            except (OSError, ValueError) as error:  # the disk, or a line that something else damaged
                self._writes = False
                files.warn_of_end(self._path, step, error)
        return rows


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _bounded(text: str | None) -> str | None:
    """The text, or its beginning and its end with a note between them."""
    if text is None or len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half} characters left out …]\n{text[-half:]}"


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as a tracker's table has them: one cell for a completion's tokens, with log q − log p, as JSON."""
    names = ("step", "row", "score", "divergence", "prompt", "feedback")
    return [
        {
            **{name: row[name] for name in names},
            "demonstration_rows": ", ".join(str(each["row"]) for each in row["demonstrations"]),
            "demonstrations": "\n\n".join(each["text"] for each in row["demonstrations"]),
            "completion": "".join(row["tokens"]),
            "log_ratio": json.dumps(
                list(zip(row["tokens"], row["log_ratio"], strict=True)) if "log_ratio" in row else []
            ),
        }
        for row in rows
    ]
