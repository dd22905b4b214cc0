"""A version as Python code holds it: what it is, its figures, and what is done with it."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as Drawn

from moeflow import report
from moeflow.report import about as abouts
from moeflow.report import card, comparing, side_by_side
from moeflow.report.about import About
from moeflow.report.table import words
from moeflow.run import pulling
from moeflow.sizes import bytes_text
from moeflow.store import Store, versions


class Table(Sequence[Mapping[str, Any]]):
    """Rows of figures: a sequence of mappings, shown as a table, and a DataFrame where pandas is installed."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
        self.columns, self.records = tuple(columns), [dict(row) for row in rows]

    def frame(self) -> Any:
        """The rows as a pandas DataFrame. Raises ImportError where pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("pandas is not installed: pip install pandas, or use .records") from error
        return pandas.DataFrame(self.records)

    def row(self, name: str) -> dict[str, Any]:
        """The row of this name, or the first that a gate knows by this word. Raises KeyError."""
        for field in ("name", "figure"):
            for row in self.records:
                if row.get(field) == name:
                    return row
        raise KeyError(f"there is no figure {name!r}; there are {', '.join(str(r['name']) for r in self.records) or 'none'}")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, at: Any) -> Any:
        return self.records[at]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.records)

    def __repr__(self) -> str:
        drawn = Drawn(box=SIMPLE, pad_edge=False)
        drawn.add_column("")
        for column in self.columns:
            drawn.add_column(column, justify="right")
        for name, *values in self._words():
            drawn.add_row(name.replace("[", r"\["), *values)
        out = _plain()
        with out.capture() as said:
            out.print(drawn)
        return "\n".join(line.rstrip() for line in said.get().strip("\n").splitlines())

    def _repr_html_(self) -> str:
        cells = [f"<th></th>{''.join(f'<th>{html.escape(c)}</th>' for c in self.columns)}"]
        for name, *values in self._words():
            numbers = "".join(f'<td style="text-align:right">{html.escape(v)}</td>' for v in values)
            cells.append(f'<td style="text-align:left">{html.escape(name)}</td>{numbers}')
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"

    def _words(self) -> Iterator[list[str]]:
        for row in self.records:
            yield words(row, self.columns)


def _plain() -> Console:
    """A console for text alone, also inside a notebook, where rich would show an empty box beside it."""
    return Console(width=200, color_system=None, force_jupyter=False, force_terminal=False)


class Comparison(Table):
    """The figures of several versions side by side, and what else differs; shown as `moeflow compare` shows it."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        self.told = told
        """All of it, as `moeflow compare --json` prints it."""
        refs = [one["ref"] for one in told["versions"]]
        about = ("kind", "name", "figure", "text", "unit", "original")
        rows = [{k: row[k] for k in about} | dict(zip(refs, row["values"], strict=True)) for row in told["figures"]]
        super().__init__(["original", *refs], rows)
        self.paired: list[dict[str, Any]] = told["paired"]
        """How much farther from the original each is than the first, on the same sequences, with an interval of 95 %."""
        self.layers: list[dict[str, Any]] = told["layers"]
        self.options: list[dict[str, Any]] = told["options"]
        self.lineage: dict[str, Any] = told["lineage"]

    def __repr__(self) -> str:
        out = _plain()
        with out.capture() as said:
            for title, body in side_by_side.tables(self.told):
                out.print(f"\n{title}", markup=False)
                out.print(body)
        return "\n".join(line.rstrip() for line in said.get().strip("\n").splitlines())

    def _repr_html_(self) -> str:
        made = []
        for title, body in side_by_side.tables(self.told):
            made.append(f"<b>{html.escape(title)}</b>")
            made.append(f"<p>{html.escape(body)}</p>" if isinstance(body, str) else _html(body))
        return "".join(made)


def _html(table: Drawn) -> str:
    """A table for the terminal as one of a page."""
    heads = "".join(f"<th>{html.escape(str(c.header))}</th>" for c in table.columns)
    sides = [f'<td style="text-align:{c.justify}">' for c in table.columns]
    rows = zip(*(c.cells for c in table.columns), strict=True)
    cells = ("".join(f"{td}{html.escape(str(cell))}</td>" for td, cell in zip(sides, row, strict=True)) for row in rows)
    return f"<table><tr>{heads}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


@dataclass(frozen=True)
class Version:
    """A published result in a store. `found` names it by what people write: `mixtral@3`, a label, a key."""

    store: Store
    about: versions.Version

    @property
    def ref(self) -> str:
        """`name@n`."""
        return self.about.ref

    @property
    def key(self) -> str:
        """The key under which its files are stored."""
        return self.about.key

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that point at it now."""
        return tuple(label for label, ref in versions.labelled(self.store).items() if ref == self.ref)

    @property
    def bytes(self) -> int:
        """The bytes of its files."""
        return self.store.manifest(self.key).bytes

    @cached_property
    def _all(self) -> About:
        return About(self.store, self.key, self.about)

    @cached_property
    def reports(self) -> tuple[report.Report, ...]:
        """Its reports as the steps wrote them."""
        return report.read(self.store, self.about.reports)

    @property
    def report(self) -> Table:
        """Every figure of its reports, of the original and of this version: `.records`, or `.frame()` for a DataFrame."""
        columns = dict.fromkeys(c for one in self.reports if one.rows for c in one.columns)
        return Table([*columns], [{"kind": one.kind, **row} for one in self.reports for row in one.rows])

    @property
    def notes(self) -> list[str]:
        """What its reports say in words."""
        return [*dict.fromkeys(note for one in self.reports for note in one.notes)]

    def load(self, **options: Any) -> Any:
        """The model, ready to use; `options` are those of transformers' `from_pretrained`, such as `dtype` and `device_map`."""
        from moeflow.model import loading

        files = self.store.artifact(self.key)  # its folder lives as long as this object
        model = loading.model_in(files.folder(), **options)
        model.name_or_path = self.ref
        return model

    def tokenizer(self, **options: Any) -> Any:
        """Its tokenizer, as transformers gives it."""
        from moeflow.model import loading

        files = self.store.artifact(self.key)
        return loading.tokenizer_in(files.folder(), **options)

    def pull(self, folder: str | PathLike[str], *, dense: bool = False, engine: str = "") -> Path:
        """Copy its files into a new or empty folder, with a model card and its recipe; return the folder, which transformers loads.

        `dense`: multiply low-rank matrices out, for engines without a kernel for them. `engine`: what is to load it, such as
        "vllm". Raises FileExistsError, and ValueError for an engine that loads no form of it.
        """
        wanted = pulling.Wanted.of(self.store, self.key, engine, dense=dense) if engine else pulling.Wanted(dense=dense)
        made = pulling.pull(self.store, self.key, Path(folder), wanted)
        card.describe(self._more, Path(folder), dense=bool(made.get("dense", {}).get("matrices")))
        return Path(folder)

    def push_to_hub(self, repo: str, *, private: bool | None = None, message: str = "", token: str | None = None) -> str:
        """Upload what `pull` gives to the model repository `org/name`, made if it does not exist; return the commit's address.

        Raises StoreError if the hub refuses or does not answer, ValueError if `repo` is no name.
        """
        from moeflow.sources.upload import upload

        files = self.store.artifact(self.key)
        folder = files.folder()
        card.describe(self._more, folder)
        return upload(folder, repo, private=private, message=message or f"{self.ref}, made by moeflow", token=token)

    def compare(self, *others: "Version | str") -> "Comparison":
        """This version and others side by side: figures, and by `.paired`, `.layers`, `.options` and `.lineage` what else differs.

        An other may be a version, or what names one in the same store. Raises ValueError without any.
        """
        if not others:
            raise ValueError(f"compare needs two versions or more, and {self.ref} is one; see moeflow.versions()")
        every = [self, *(found(self.store, one) if isinstance(one, str) else one for one in others)]
        return Comparison(comparing.compare([one._more for one in every]))

    def page(self, file: str | PathLike[str] = "report.html") -> Path:
        """Write it as one page that needs no network, as `moeflow report` does; return the file."""
        from moeflow.report.page import page

        Path(file).write_text(page(self._more), encoding="utf-8")
        return Path(file)

    @property
    def _more(self) -> About:
        """What reports tell of it."""
        return abouts.of(self.store, self.ref)

    def __repr__(self) -> str:
        return f"<{' '.join([self.ref, *self.labels])}: {bytes_text(self.bytes)} of files in {self.store.url}>"

    def __str__(self) -> str:
        made = self._made()
        return "\n".join([f"{self.ref}  {self.key}", *[f"made by {made}"] * bool(made), str(self.report)])

    def _made(self) -> str:
        """The pipeline and the words that were given."""
        return " ".join([str(self.about.record.get("pipeline") or ""), *map(str, self.about.record.get("given") or ())]).strip()

    def _repr_html_(self) -> str:
        made = html.escape(self._made())
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"<b>{html.escape(self.ref)}</b> <code>{made}</code>{self.report._repr_html_()}<ul>{notes}</ul>"


def found(store: Store, ref: str) -> Version:
    """The version that `ref` means; of a key, the newest that published it. Raises NotStored, and ValueError for a bare key."""
    target = versions.resolve(store, ref)
    if isinstance(target, versions.Version):
        return Version(store, target)
    published = [v for v in versions.list(store) if v.key == target]
    if not published:
        raise ValueError(f"{ref!r} is the key of a step that is published under no name; see `moeflow ls`")
    return Version(store, max(published, key=lambda v: v.created))
