"""The commands about labels: promote, rollback and history."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from moeflow.cli.common import GateWords, Json, Ref, Url, asking, command, open_store, print_json, reading, working
from moeflow.report import promotion
from moeflow.report.figures import sayable
from moeflow.report.gate import Decision, read_gate
from moeflow.run.outcome import printable
from moeflow.store import labels, versions
from moeflow.store.labels import Move

Label = Annotated[str, typer.Argument(metavar="LABEL", help="a word like production")]
Force = Annotated[bool, typer.Option("--force", help="promote it although its gate refuses it; needs --why")]
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="why, kept in the label's history with who and when")]


@command()
def promote(
    ref: Ref,
    label: Label,
    gate: GateWords = [],  # noqa: B006
    force: Force = False,
    why: Why = "",
    store: Url = "",
    json: Json = False,
) -> None:
    """Point a label at a version, if the gate that its run named lets it; afterwards REF may be the label."""
    with asking():
        if force and not why.strip():
            raise ValueError("--force needs a reason: say it with --why '...', which is kept in the label's history")
        bounds = [b.word for b in read_gate(gate)]
        opened = open_store(store)
        considered = promotion.consider(opened, ref, label, bounds)
    if not json:
        print_decisions(considered.decisions)
    with working():
        version = promotion.promote(opened, considered, forced=force, why=why)
    if json:
        decisions = [sayable(asdict(d)) for d in considered.decisions]
        forced = not considered.passed
        print_json({"label": label, "ref": version.ref, "key": version.key, "gate": decisions, "forced": forced})
    else:
        print(f"{label} is {version.ref}, {version.key}")


@command()
def rollback(label: Label, why: Why = "", store: Url = "", json: Json = False) -> None:
    """Point a label at the version that it pointed at before; once more, at the one before that."""
    with asking():
        opened = open_store(store)
        there = labels.history(opened, label)[-1]
    with working():
        about = {"by": promotion.who()} | ({"why": why} if why else {})
        version = versions.rollback(opened, label, about=about)
    if json:
        print_json({"label": label, "ref": version.ref, "key": version.key, "was": there.ref})
    else:
        print(f"{label} is {version.ref} again, {version.key}; it was {there.ref}")


@command()
def history(label: Label, store: Url = "", json: Json = False) -> None:
    """Show every move of a label, newest last: to which version, when, by whom, what the gate said and why it was forced."""
    with asking():
        moves = labels.history(reading(store), label)
    if json:
        print_json([_move(m) for m in moves])
        return
    for m in moves:
        print(printable(f"{m.n:>4}  {m.ref:<24} {m.created}  by {m.about.get('by', 'somebody')}{_told(m)}"))


def print_decisions(decisions: tuple[Decision, ...]) -> None:
    """What the gate says, a line for each bound."""
    for d in decisions:
        print(printable(f"{'ok' if d.state == 'holds' else 'no':<4}{d.why}"))


def _told(m: Move) -> str:
    """What a move's record says besides, in words."""
    parts = [f"back to move {m.back_to}"] if m.back_to else []
    if gate := m.about.get("gate"):
        refused = [d["why"] for d in gate if d["state"] != "holds"]
        parts.append(f"forced past its gate ({'; '.join(refused)})" if refused else f"gate passed, {len(gate)} of {len(gate)}")
    parts += [f"because {m.about['why']}"] if m.about.get("why") else []
    return "".join(f", {part}" for part in parts)


def _move(m: Move) -> dict[str, Any]:
    return {"n": m.n, "ref": m.ref, "created": m.created, "back_to": m.back_to, **m.about}
