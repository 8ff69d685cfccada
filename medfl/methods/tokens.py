"""What a refresh pass collects at the quantizers: sums per code, or a sample of the tokens themselves."""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from medfl.methods.base import Method
from medfl.models.quantizer import CodeSums, Quantizer


class AtQuantizers(ABC):
    """While active, `_see` gets the tokens (B, N, D) that enter each quantizer of a method."""

    def __init__(self, method: Method) -> None:
        self._books = method.codebooks()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @abstractmethod
    def _see(self, name: str, book: Quantizer, tokens: Tensor) -> None: ...

    def __enter__(self) -> Self:
        for name, book in self._books.items():

            def seen(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name, book: Quantizer = book) -> None:
                self._see(name, book, inputs[0].detach())

            self._hooks.append(book.register_forward_pre_hook(seen))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()


class CodeStatistics(AtQuantizers):
    """`sums[name]`: the sums per code of all tokens, under the codebook as it is.

    with torch.no_grad(), CodeStatistics(method) as codes:
        for images in batches:
            method.observe(images, progress)
    """

    def __init__(self, method: Method) -> None:
        super().__init__(method)
        self.sums: dict[str, CodeSums] = {}

    def _see(self, name: str, book: Quantizer, tokens: Tensor) -> None:
        new = book.statistics(tokens)
        self.sums[name] = self.sums[name] + new if name in self.sums else new


class TokenSample(AtQuantizers):
    """`tokens()[name]`: up to `most` tokens of each image, (images, tokens, D), on the CPU; they stay at the site."""

    def __init__(self, method: Method, *, most: int, generator: torch.Generator) -> None:
        super().__init__(method)
        self._most, self._generator = most, generator
        self._parts: dict[str, list[Tensor]] = {}

    def _see(self, name: str, book: Quantizer, tokens: Tensor) -> None:
        del book
        chosen = torch.randperm(tokens.shape[1], generator=self._generator)[: self._most].to(tokens.device)
        self._parts.setdefault(name, []).append(tokens[:, chosen].float().cpu())

    def tokens(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self._parts.items()}
