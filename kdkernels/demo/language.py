"""A language model of characters: a student with little text, alone, with its teacher's text, and with its teacher's judgement.

The text is the reference manual that comes with Python (pydoc's topics). The teacher reads nearly all of it, a student a
small part. Then the student goes on three ways for as many steps: on the same text; on text that the teacher has written
(sequence-level distillation); or on what it writes itself, where the teacher's distribution is its target (on-policy
distillation, generalised Jensen-Shannon divergence from hidden states: GKD).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

import kdkernels
from kdkernels.console import print_table
from kdkernels.demo import models
from kdkernels.demo.classification import described, one_thread
from kdkernels.demo.train import Settings
from kdkernels.schemes import TeacherSequences

if TYPE_CHECKING:
    from kdkernels.console import Reporter

LENGTH, BATCH, PROMPT = 64, 16, 16
HELD_OUT, SEEN = 40_000, 15_000  # characters
ALONE, SEQUENCES, ON_POLICY = "its text alone", "the teacher's text too", "the teacher on its own text"


@dataclass(frozen=True)
class Config(Settings):
    teacher_steps: int = 400
    start_steps: int = 200
    more_steps: int = 150
    writes: int = 128  # sequences of the teacher
    beta: float = 0.5

    @property
    def steps(self) -> int:
        """Steps of all models, for a progress bar."""
        return self.teacher_steps + self.start_steps + 3 * self.more_steps


@dataclass
class Outcome:
    """Held-out perplexity a character of everybody."""

    config: Config
    device: torch.device
    backend: str
    characters: tuple[int, int, int]  # the teacher's, the student's, held out
    parameters: tuple[int, int]
    teacher: float
    start: float
    students: dict[str, float] = field(default_factory=dict)


class Text:
    """The manual as character numbers, its last part held out."""

    def __init__(self, device: torch.device):
        from pydoc_data.topics import topics

        text = "".join(c for _, page in sorted(topics.items()) for c in page if c.isascii())
        known = sorted(set(text))
        self.classes = len(known)
        number = {c: i for i, c in enumerate(known)}
        everything = torch.tensor([number[c] for c in text], device=device)
        self.train, self.test = everything[:-HELD_OUT], everything[-HELD_OUT:]
        # From its middle, so that it is like the rest.
        middle = len(self.train) // 2
        self.seen = self.train[middle : middle + SEEN]


class Transformer(nn.Module):
    """A small causal one; `hidden` is what its head takes."""

    def __init__(self, classes: int, width: int, layers: int, heads: int = 4):
        super().__init__()
        self.tokens, self.places = nn.Embedding(classes, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes, bias=False)

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        n = tokens.shape[1]
        x = self.tokens(tokens) + self.places.weight[:n]
        mask = torch.ones(n, n, dtype=torch.bool, device=tokens.device).triu(1)
        for block in self.blocks:
            x = block(x, src_mask=mask)
        return self.norm(x)

    @torch.no_grad()
    def write(self, prompts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The prompts, continued to LENGTH by sampling."""
        tokens = prompts
        while tokens.shape[1] < LENGTH:
            probabilities = self.head(self.hidden(tokens)[:, -1]).softmax(-1).cpu()
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator).to(tokens.device)], 1)
        return tokens


def draw(text: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, len(text) - length, (count,), generator=generator)
    return torch.stack([text[i : i + length] for i in starts.tolist()])


@torch.no_grad()
def perplexity(model: Transformer, text: torch.Tensor) -> float:
    """A character, each window on its own."""
    windows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    total = sum(
        float(F.cross_entropy(model.head(model.hidden(w[:, :-1])).flatten(0, 1), w[:, 1:].flatten())) * len(w)
        for w in windows.split(128)
    )
    return math.exp(total / len(windows))


def train(
    model: Transformer, steps: int, rate: float, loss: Callable[[], torch.Tensor], advance: Callable[[], None]
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        advance()


class Lesson:
    """A trained teacher, and what its students do."""

    def __init__(self, config: Config, bar: Reporter):
        self.config, self.bar, self.device = config, bar, config.torch_device()
        self.backend = kdkernels.backends.resolve(
            "linear_js_div", (torch.empty(0, device=self.device),), config.backend
        )
        self.text = Text(self.device)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.completion = (torch.arange(LENGTH, device=self.device) >= PROMPT).expand(BATCH, -1)
        bar.step("teacher")
        self.teacher = self.made(96, 2, config.seed)
        self.train(self.teacher, config.teacher_steps, 2e-3, lambda: self.on(self.teacher, self.drawn(self.text.train)))
        self.ways = {ALONE: self.alone, SEQUENCES: self.sequences, ON_POLICY: self.on_policy}

    def made(self, width: int, layers: int, seed: int) -> Transformer:
        model = models.seeded(lambda: Transformer(self.text.classes, width, layers), seed, self.device)
        assert isinstance(model, Transformer)
        return model

    def drawn(self, text: torch.Tensor, count: int = BATCH, length: int = LENGTH) -> torch.Tensor:
        return draw(text, count, length, self.generator)

    def train(self, model: Transformer, steps: int, rate: float, loss: Callable[[], torch.Tensor]) -> None:
        train(model, steps, rate, loss, self.bar.advance)

    def perplexity(self, model: Transformer) -> float:
        return perplexity(model, self.text.test)

    def begun(self, seed: int) -> Transformer:
        """A student who has read its own text for a while."""
        model = self.made(48, 1, seed)
        self.train(model, self.config.start_steps, 3e-3, lambda: self.on(model, self.drawn(self.text.seen)))
        return model

    def written(self) -> TeacherSequences:
        prompts = self.drawn(self.text.seen, self.config.writes, PROMPT)
        return TeacherSequences.write(
            lambda p: self.teacher.write(p, self.generator), prompts, batch_size=self.config.writes
        )

    def further(self, first: Transformer, way: str, written: TeacherSequences) -> float:
        """The perplexity of a copy of it that goes on in this way."""
        model = self.made(48, 1, 0)
        model.load_state_dict(first.state_dict())
        self.train(model, self.config.more_steps, 1e-3, lambda: self.ways[way](model, written))
        return self.perplexity(model)

    def on(self, model: Transformer, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return kdkernels.linear_sequence_loss(
            model.hidden(tokens), model.head.weight, tokens, mask, backend=self.config.backend
        )

    def alone(self, model: Transformer, written: TeacherSequences) -> torch.Tensor:
        return self.on(model, self.drawn(self.text.seen))

    def sequences(self, model: Transformer, written: TeacherSequences) -> torch.Tensor:
        return self.on(model, *written.draw(BATCH, self.generator)) + self.alone(model, written)

    def on_policy(self, model: Transformer, written: TeacherSequences) -> torch.Tensor:
        tokens = model.write(self.drawn(self.text.seen, BATCH, PROMPT), self.generator)
        with torch.no_grad():
            judged = self.teacher.hidden(tokens)
        # What the student wrote after the prompt, and was at that time predicting.
        return kdkernels.linear_generalized_js_div(
            model.hidden(tokens), model.head.weight, judged, self.teacher.head.weight.detach(), beta=self.config.beta,
            weight=self.completion.roll(-1, 1), compact=True, backend=self.config.backend,
        ) + self.alone(model, written)  # fmt: skip


def run(config: Config, bar: Reporter) -> Outcome:
    """Trains a teacher, a student to begin with, and that student on in three ways."""
    with one_thread():
        lesson = Lesson(config, bar)
        bar.step("student, to begin with")
        first, text = lesson.begun(config.seed + 1), lesson.text
        outcome = Outcome(
            config, lesson.device, described(lesson.backend), (len(text.train), len(text.seen), len(text.test)),
            (models.parameters(lesson.teacher), models.parameters(first)), lesson.perplexity(lesson.teacher),
            lesson.perplexity(first),
        )  # fmt: skip
        written = lesson.written()
        for way in lesson.ways:
            bar.step(f"student: {way}")
            outcome.students[way] = lesson.further(first, way, written)
    return outcome


def show(outcome: Outcome) -> None:
    many, few, held_out = outcome.characters
    large, small = outcome.parameters
    rows = [
        ("teacher", f"{large}", f"{many}", f"{outcome.teacher:.2f}", ""),
        ("student, to begin with", f"{small}", f"{few}", f"{outcome.start:.2f}", ""),
    ]
    base = outcome.students[ALONE]
    for name, value in outcome.students.items():
        rows.append(
            (f"student, {name}", f"{small}", f"{few}", f"{value:.2f}", "" if name == ALONE else f"{value - base:+.2f}")
        )
    print_table(
        f"Python's reference manual by characters: perplexity on {held_out} held-out ones, lower is better",
        ("model", "parameters", "characters seen", "perplexity", "against its text alone"),
        rows,
    )
    print(f"Backend: {outcome.backend}, on {outcome.device}")
    print(
        f"\nEvery student goes on from the same start for {outcome.config.more_steps} steps. The teacher's text is sequence-level"
        "\ndistillation; its judgement of what the student writes itself is on-policy distillation, a generalised"
        "\nJensen-Shannon divergence straight from both models' hidden states. Both go with the student's own text."
        f"\nOne run of small models: every number comes again with --seed {outcome.config.seed}, and moves with another."
    )
