"""New words of a text encoder: rows beside its vocabulary, which stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

CLOSE = 1e-6  # relative: a norm that is off by less is that of a row just rescaled


@dataclass
class Span:
    """The ids of one embedding's tokens."""

    start: int
    count: int

    def place(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids, any shape -> whether each is one of these, and which; 0 where it is none."""
        which = ids - self.start
        own = (which >= 0) & (which < self.count)
        return own, torch.where(own, which, 0)


class Rows(nn.Module):
    """A text encoder's input embedding with further tokens.

    Args:
        table: the vocabulary's.
        spans: name -> its token ids; all are free: no word of the vocabulary has them, whatever the table's length.
        inputs: name -> [n, D] fp32 rows that train.
        fixed: name -> [n, D] fp32 rows that do not: what stands where an output embedding replaces the result.
        outputs: name -> [n, D] fp32 vectors that `replace` puts in after the text encoder.
    """

    def __init__(
        self,
        table: nn.Module,
        spans: dict[str, Span],
        *,
        inputs: dict[str, Tensor],
        fixed: dict[str, Tensor],
        outputs: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.table, self.spans = table, spans
        self.inputs = nn.ParameterDict({key(name): nn.Parameter(rows) for name, rows in inputs.items()})
        self.outputs = nn.ParameterDict({key(name): nn.Parameter(rows) for name, rows in outputs.items()})
        self.fixed = nn.ParameterDict({key(name): nn.Parameter(rows, False) for name, rows in fixed.items()})
        self.read: Tensor | None = None  # [B, L] the ids of the last prompts, as the family gave them
        self.norms: dict[str, float | Tensor] = {}  # name -> what `keep_norms` keeps: one number, or [n, 1]

    @property
    def weight(self) -> nn.Parameter:
        """The vocabulary's table."""
        return self.table.weight

    def new_parameters(self) -> list[nn.Parameter]:
        """All but the vocabulary's table."""
        return [rows for group in (self.inputs, self.outputs, self.fixed) for rows in group.values()]

    def trained(self, name: str) -> nn.Parameter:
        """[n, D] what trains of an embedding."""
        rows = self.outputs if key(name) in self.outputs else self.inputs
        return rows[key(name)]

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] token ids -> [B, L, D], in the dtype of the table."""
        self.read = ids
        places = [(span.place(ids), self.row(name)) for name, span in self.spans.items()]
        new = torch.stack([own for (own, _), _ in places]).any(0)
        found = self.table(ids.masked_fill(new, 0))
        for (own, which), rows in places:
            found = torch.where(own.unsqueeze(-1), functional.embedding(which, rows).to(found.dtype), found)
        return found

    def row(self, name: str) -> Tensor:
        """[n, D] what stands for the tokens at the input."""
        return self.fixed[key(name)] if key(name) in self.fixed else self.inputs[key(name)]

    def replace(self, hidden: Tensor) -> Tensor:
        """[B, L, D] the encoder's result for the prompts read last -> with the output embeddings at their places."""
        for name in self.spans:
            if key(name) in self.outputs:
                own, which = self.place(name, hidden)
                vectors = functional.embedding(which, self.outputs[key(name)])
                hidden = torch.where(own.unsqueeze(-1), vectors.to(hidden.dtype), hidden)
        return hidden

    def place(self, name: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L] whether each token read last is one of an embedding's, and which; `hidden` [B, L, D] is their result,
        in which the chunks of a long prompt lie in a row."""
        assert self.read is not None, "no prompt was read"
        return self.spans[name].place(self.read.reshape(hidden.shape[:2]))

    @torch.no_grad()
    def keep_norms(self) -> None:
        """Rescale each vector to its norm in `norms`. Twice is once: rows at rest keep their bits."""
        for name, norm in self.norms.items():
            rows = self.trained(name)
            target = norm.to(rows.device) if isinstance(norm, Tensor) else norm
            factor = target / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
            rows.mul_(torch.where((factor - 1).abs() > CLOSE, factor, 1.0))


def key(name: str) -> str:
    """A name inside a ParameterDict, whose own methods have names too."""
    return f"<{name}>"


@torch.no_grad()
def median_norm(table: Tensor) -> float:
    """Of the rows [V, D]."""
    return float(torch.linalg.vector_norm(table, dim=1, dtype=torch.float32).median())


@torch.no_grad()
def random_rows(table: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count, D] fp32, normal with the mean and the spread of the vocabulary [V, D] in each number, of its median
    norm."""
    mean, spread = statistics(table)
    rows = mean + spread * torch.randn(count, table.shape[1], generator=generator, device="cpu", dtype=torch.float32)
    return of_norm(rows, median_norm(table))


def of_norm(rows: Tensor, norm: float) -> Tensor:
    """[n, D] in the same directions, each as long as `norm`."""
    return rows * (norm / rows.norm(dim=1, keepdim=True).clamp(min=1e-12))


def statistics(table: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [D] fp32 of the rows [V, D], a part of the columns at a time: T5's table in fp32
    would take half a gigabyte."""
    parts = [columns(part) for part in table.split(256, dim=1)]
    return torch.cat([mean for mean, _ in parts]), torch.cat([spread for _, spread in parts])


def columns(part: Tensor) -> tuple[Tensor, Tensor]:
    exact = part.float().cpu()
    return exact.mean(0), exact.std(0)


def pool_at_the_end(part: nn.Module, end: int) -> None:
    """Let a CLIP text encoder pool at the end-of-text token `end`.

    Published configs say eos_token_id=2, for which transformers takes the highest id of the prompt: right as long as
    the end token is the last of the vocabulary, and wrong as soon as a new token comes after it.
    """
    for module in pooling(part):
        module.eos_token_id = end


def pooling(part: nn.Module) -> Iterator[nn.Module]:
    """The modules that keep an end-of-text token of their own."""
    return (module for module in part.modules() if "eos_token_id" in vars(module))
