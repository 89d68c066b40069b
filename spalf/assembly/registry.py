"""Names to classes, with the distribution each came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from spalf.assembly.hints import suggest
from spalf.core.slots import SLOTS, ComponentRef, label
from spalf.errors import ComponentError, Problem, RecipeError


class Registry:
    """The components on offer: a value, one per process or per test; iterates over their `ComponentRef`s.

    Raises ComponentError where an offered class has no label or two classes have the same one.
    """

    def __init__(self, offers: Iterable[tuple[type, str]]) -> None:
        classes: dict[ComponentRef, type] = {}
        origins: dict[ComponentRef, str] = {}
        twice: list[str] = []
        for cls, origin in offers:
            ref = label(cls)
            if ref in classes:
                twice.append(
                    f'{ref.slot} "{ref.use}" is offered twice: by {origins[ref]} and by {origin} (rename one of them)'
                )
                continue
            classes[ref], origins[ref] = cls, origin
        if twice:
            raise ComponentError("\n".join(twice))
        order = list(SLOTS)
        self._refs = tuple(sorted(classes, key=lambda ref: (order.index(ref.slot), ref.use)))
        self._classes = classes
        self._origins = origins

    def __iter__(self) -> Iterator[ComponentRef]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __contains__(self, ref: object) -> bool:
        return ref in self._classes

    def names(self, slot: str) -> tuple[str, ...]:
        """What a recipe may write for `slot`, in name order."""
        return tuple(ref.use for ref in self._refs if ref.slot == slot)

    def resolve(self, slot: str, use: str) -> type:
        """The class of a name. Raises RecipeError with the nearest name."""
        if slot not in SLOTS:
            raise RecipeError([Problem(slot, f'no slot is called "{slot}"', suggest(slot, SLOTS, "slots"))])
        cls = self._classes.get(ComponentRef(slot, use))
        if cls is None:
            hint = suggest(use, self.names(slot), "known")
            raise RecipeError([Problem(slot, f'no {slot} is called "{use}"', hint)])
        return cls

    def origin(self, ref: ComponentRef) -> str:
        """Distribution and version that offer `ref`. Raises RecipeError where nobody does."""
        self.resolve(ref.slot, ref.use)
        return self._origins[ref]
