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
from kdkernels.cli.console import print_table
from kdkernels.demo import models
from kdkernels.demo.classification import described, one_thread

if TYPE_CHECKING:
    from kdkernels.cli.console import Reporter

LENGTH, BATCH, PROMPT = 64, 16, 16
HELD_OUT, SEEN = 40_000, 15_000  # characters
TEACHER_WRITES = 128  # sequences
ALONE, SEQUENCES, ON_POLICY = "its text alone", "the teacher's text too", "the teacher on its own text"


@dataclass(frozen=True)
class Config:
    seed: int = 0
    teacher_steps: int = 400
    start_steps: int = 200
    more_steps: int = 150
    beta: float = 0.5
    backend: str = "auto"
    device: str | None = None

    @property
    def steps(self) -> int:
        """Steps of all models, for a progress bar."""
        return self.teacher_steps + self.start_steps + 3 * self.more_steps

    def torch_device(self) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cuda" if torch.cuda.is_available() and self.backend != "cpu" else "cpu")


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


def run(config: Config, bar: Reporter) -> Outcome:
    """Trains a teacher, a student to begin with, and that student on in three ways."""
    with one_thread():
        return _run(config, bar)


def _run(config: Config, bar: Reporter) -> Outcome:
    device = config.torch_device()
    backend = kdkernels.backends.resolve("linear_js_div", (torch.empty(0, device=device),), config.backend)
    text = Text(device)
    generator = torch.Generator().manual_seed(config.seed)

    def on(model: Transformer, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return kdkernels.linear_sequence_loss(
            model.hidden(tokens), model.head.weight, tokens, mask, backend=config.backend
        )

    bar.step("teacher")
    teacher = models.seeded(lambda: Transformer(text.classes, 96, 2), config.seed, device)
    assert isinstance(teacher, Transformer)
    train(
        teacher,
        config.teacher_steps,
        2e-3,
        lambda: on(teacher, draw(text.train, BATCH, LENGTH, generator)),
        bar.advance,
    )

    def student() -> Transformer:
        made = models.seeded(lambda: Transformer(text.classes, 48, 1), config.seed + 1, device)
        assert isinstance(made, Transformer)
        return made

    bar.step("student, to begin with")
    first = student()
    train(first, config.start_steps, 3e-3, lambda: on(first, draw(text.seen, BATCH, LENGTH, generator)), bar.advance)

    outcome = Outcome(
        config, device, described(backend), (len(text.train), len(text.seen), len(text.test)),
        (models.parameters(teacher), models.parameters(first)), perplexity(teacher, text.test), perplexity(first, text.test),
    )  # fmt: skip
    written = teacher.write(draw(text.seen, TEACHER_WRITES, PROMPT, generator), generator)
    completion = (torch.arange(LENGTH, device=device) >= PROMPT).expand(BATCH, -1)

    def alone(model: Transformer) -> torch.Tensor:
        return on(model, draw(text.seen, BATCH, LENGTH, generator))

    def sequences(model: Transformer) -> torch.Tensor:
        chosen = torch.randint(0, TEACHER_WRITES, (BATCH,), generator=generator)
        return on(model, written[chosen.to(device)], completion) + alone(model)

    def on_policy(model: Transformer) -> torch.Tensor:
        tokens = model.write(draw(text.seen, BATCH, PROMPT, generator), generator)
        with torch.no_grad():
            judged = teacher.hidden(tokens)
        # What the student wrote after the prompt, and was at that time predicting.
        return kdkernels.linear_generalized_js_div(
            model.hidden(tokens), model.head.weight, judged, teacher.head.weight.detach(), beta=config.beta,
            weight=completion.roll(-1, 1), compact=True, backend=config.backend,
        ) + alone(model)  # fmt: skip

    for name, loss in ((ALONE, alone), (SEQUENCES, sequences), (ON_POLICY, on_policy)):
        bar.step(f"student: {name}")
        model = student()
        model.load_state_dict(first.state_dict())
        train(model, config.more_steps, 1e-3, lambda loss=loss, model=model: loss(model), bar.advance)  # type: ignore[misc]
        outcome.students[name] = perplexity(model, text.test)
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
